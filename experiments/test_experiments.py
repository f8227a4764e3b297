"""What the experiments promise. The helpers and the small runs are those of test_pmp.py."""

import copy
import dataclasses
import json
import math
import shutil
import sys
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402

# pytest finds the fixtures of test_pmp.py under the names that are imported here
from test_pmp import CPU, bad, cache, corpus, differs, finished, flags, secret_of, small_model, tokens  # noqa: E402
import attacks  # noqa: E402
import measures  # noqa: E402
import pictures  # noqa: E402
import plan  # noqa: E402
import plot  # noqa: E402
import pmp  # noqa: E402
import recipe  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import torch  # noqa: E402
import verdicts  # noqa: E402
from store import Results  # noqa: E402
from model import initial_std  # noqa: E402
from runtime.files import UserError  # noqa: E402

__all__ = ["cache", "corpus", "finished", "flags"]

# -----------------------------------------------------------------------------
# the plan


class Made:
    """Stands for Results: what `make` says of every job that is asked for."""

    def __init__(self, make, scale="laptop", known=()):
        self.make, self.scale, self.found, self.known, self.memo = make, plan.SCALES[scale], {}, known, {}
        self.name, self.folder = scale, Path("nowhere") / scale

    def get(self, job):
        if job and (not self.known or job.kind in self.known):
            self.found.setdefault((job.kind, job.key), {"key": json.loads(job.key), "seconds": 1.0} | self.make(job))
            return self.found[job.kind, job.key]


def no_effect(job):
    """A result in which PMP is like dense: only random weights are worse; seeds differ."""
    noise = float(np.random.default_rng(zlib.crc32(job.key.encode())).standard_normal())
    if job.kind == "model":
        name, seed = job.what["model"], job.what["seed"]
        late = 0.1 * (1 - float(name.split("x")[1])) if " x" in name else 0.0
        return {"text_loss": 5 + 0.01 * seed + 0.001 * noise + late, "ticket": None, "iou": []}
    if job.kind == "tune":
        base = 50 if "scratch" in job.what["arm"] else 80
        accuracy = base - abs(math.log2(job.what["rate"] or 1) - 1) + 0.3 * noise
        return {"accuracy": accuracy, "loss": 1.0, "curve": {"1": base, "2": accuracy}, "text_loss": 6 + 0.01 * noise,
                "updates": 4, "majority": 50.0}
    if job.kind == "landscape":
        places = dict.fromkeys(measures.PLACES, [1 + 0.01 * noise] * 2)
        return {"curves": {place: [[5.0] * 9] for place in places}, "alphas": measures.ALPHAS,
                "curvature": dict.fromkeys(measures.SCALINGS, places)}
    if job.kind == "gradients":
        return {"auc": {"all entries": 0.5 + 0.01 * noise, "within tensors": 0.5},
                "zero": {"ticket": 0, "complement": 0}, "histogram": {"ticket": [1] * 60, "complement": [1] * 60}}
    if job.kind == "one_step":
        arms = ("outsider", "authorised", "complement", "authorised, same length", "complement, same length")
        return {"change": {arm: [[1e-3 * (1 + 0.1 * abs(noise))] * 3] for arm in arms}, "sizes": measures.SIZES}
    if job.kind == "recovery_by_kind":
        return {"auc": dict.fromkeys(attacks.BY_KIND, {"all entries": 0.8, "q": 0.7})}
    if job.what["attack"] == "release folder":
        return {"same_files": True, "differing": [], "same_header": True}
    return {"auc": 0.5, "iou": 0.54 + 0.01 * noise}


def test_the_plan_is_whole_and_what_chooses_judges_nothing():
    scale = plan.SCALES["laptop"]
    nothing = Made(no_effect, known=("none",))
    found, waiting = plan.jobs(scale, nothing)
    assert waiting > 500 and all(job.what["seed"] in plan.CHOOSING for job in found[:6])
    found, waiting = plan.jobs(scale, Made(no_effect))
    assert waiting == 0 and len({(job.kind, job.key) for job in found}) == len(found) > 1500
    models = {(job.what["model"], job.what["seed"]) for job in found if job.kind == "model"}
    choosing = plan.CHOOSING + plan.TRYING
    for job in found:
        assert set(job.needs) <= models
        if job.kind == "tune":
            assert (job.what["on"] == "choose") == (job.what["seed"] in choosing)
    seeds = {name: sum(model == name for model, seed in models if seed not in choosing) for name, _ in models}
    assert [seeds[name] for name in ("dense", "pmp", "random", "untied-matched")] == [16, 16, 12, 8]
    assert seeds["rho0.5"] == seeds["gpt2-pmp"] == 4 and seeds["literal-pmp"] == 10 and seeds["shrunk"] == 3
    assert len(set(scale.seeds["tuned"])) == 8 and len(plan.tuned_by(scale, "pmp: Lion")) == 8


def test_a_scale_without_a_search_has_the_same_rates_for_all_arms_and_is_reported(tmp_path, capsys):
    scale, results = plan.SCALES["gpt2"], Made(no_effect, "gpt2")
    found, waiting = plan.jobs(scale, results)
    models = [(job.what["model"], job.what["seed"]) for job in found if job.kind == "model"]
    runs = [tuple(job.what[key] for key in ("seed", "arm", "task", "rate")) for job in found if job.kind == "tune"]
    assert waiting == 0 and len(set(models)) == len(models) == 12 and {job.what.get("on") for job in found} == {
        None, "judge"}
    settings = [("docs", 1.0), ("docs", 4.0), ("cola", 1.0), ("sst2", 1.0), ("rte", 1.0)]
    assert sorted(runs) == sorted((seed, arm, *setting) for seed in range(4) for setting in settings
                                  for arm in ("dense", "pmp", "pmp + mask", "random"))
    table = report.unsearched(verdicts.Evidence(results)).splitlines()
    assert len(table) == 2 + 5 * 4 and table[2].startswith("| dense | docs | 1 x | 4 | ")
    (tmp_path / "gpt2").mkdir()
    line = {"key": json.loads(found[0].key), **no_effect(found[0])}
    (tmp_path / "gpt2" / "model.jsonl").write_text(json.dumps(line) + "\n")
    report.main(["--scale", "gpt2", "--results", str(tmp_path)])
    text = capsys.readouterr().out
    assert "| dense | 1 | 5.00 |" in text and "Not fine-tuned yet." in text
    bad("--scale", "gpt2", "--results", tmp_path, "--write", expect="--write", capsys=capsys, main=report.main)


def test_a_key_has_the_settings_that_made_the_result(monkeypatch):
    scale, results = plan.SCALES["laptop"], Made(no_effect)
    keys = [plan.tune_job(scale, "pmp", 0, "docs", 1.0, 2, "judge", results).key]
    monkeypatch.setitem(plan.TASKS, "docs", plan.Task(100, 128, batch=4, length=128))
    keys.append(plan.tune_job(scale, "pmp", 0, "docs", 1.0, 2, "judge", results).key)
    monkeypatch.setitem(plan.MODELS, "pmp", plan.Model({"rho": 0.6}))
    keys.append(plan.tune_job(scale, "pmp", 0, "docs", 1.0, 2, "judge", results).key)
    assert len(set(keys)) == 3


def test_a_search_goes_on_at_its_end_and_takes_the_best():
    def peak(job):
        return {"accuracy": -abs(math.log2(job.what["rate"]) - 5) - abs(job.what["epochs"] - 4)}
    scale, results = plan.SCALES["laptop"], Made(lambda job: peak(job) if job.kind == "tune" else no_effect(job))
    assert plan.choice(scale, "pmp", "docs", results) == (32.0, 4)  # beyond the 16 that it starts with
    rates = {rate for rate, _ in plan.candidates(scale, "pmp", "docs", results)}
    assert rates == {1, 2, 4, 8, 16, 32, 64}
    assert plan.choice(scale, "rho0.9", "docs", results) == (32.0, 4) and plan.choice(
        scale, "dense base", "docs", results) == (0.0, 0)


def test_the_matched_model_stops_where_dense_has_the_loss_of_pmp():
    losses = {"untied-dense": 5.0, "untied-dense x0.9": 5.1, "untied-dense x0.75": 5.2, "untied-pmp": 5.05}
    results = Made(lambda job: {"text_loss": losses[job.what["model"]]})
    assert plan.matched_share(plan.SCALES["laptop"], results) == 1140 / 1200
    assert plan.model_flags(plan.SCALES["laptop"], "untied-matched", 3, results)["steps"] == 1140
    assert plan.model_flags(plan.SCALES["laptop"], "untied-matched", 3, Made(no_effect, known=("tune",))) is None


# -----------------------------------------------------------------------------
# the workshop


@pytest.fixture(scope="session")
def models(finished, flags, tmp_path_factory):
    """A work folder with a PMP and a dense model of two seeds, which are the same ones."""
    work = tmp_path_factory.mktemp("work") / "quick"
    work.mkdir()
    pmp.main([*flags, "--rho", "1.0", "--out", str(work / "dense-0")])
    shutil.copytree(finished, work / "pmp-0")
    for name in ("dense", "pmp"):
        for seed in (1, *plan.CHOOSING):
            (work / f"{name}-{seed}").symlink_to(work / f"{name}-0")
    return work


@pytest.fixture
def shop(models, corpus, tmp_path, monkeypatch):
    """A Workshop at a scale of seconds: two kinds of models, three arms, small texts."""
    seeds = dict.fromkeys(("main", "tuned"), (0, 1)) | dict.fromkeys(
        ("fresh", "untied", "side", "literal", "recipe", "one"), ())
    scale = plan.Scale({"preset": "mini", "data": str(corpus)}, seeds, rows=0.2, epochs=(1,), further=0,
                       strongest=(1, 0), text_blocks=2, outsiders=())
    monkeypatch.setitem(plan.SCALES, "quick", scale)
    monkeypatch.setattr(plan, "MODELS", {name: plan.MODELS[name] for name in ("dense", "pmp")})
    monkeypatch.setattr(plan, "CHOOSERS", ("dense", "pmp"))
    monkeypatch.setattr(plan, "matched_share", lambda *_: 1.0)
    monkeypatch.setattr(plan, "SEARCHED", {name: plan.SEARCHED[name] for name in ("scratch", "dense", "pmp")})
    monkeypatch.setattr(plan, "VARIED", {})
    monkeypatch.setattr(plan, "RECOVERIES", ("weight magnitude",))
    monkeypatch.setattr(plan, "START", {"scratch": (1.0,), "full": (1.0, 2.0)})
    monkeypatch.setattr(measures, "DIRECTIONS", 2)
    made = run.Workshop(scale, Results("quick", tmp_path / "results").refresh(), models, device="cpu")
    made.public = lambda release, index: made.text(release, 0).read(2 * index, 2, 32)  # less than an attacker's
    rows = [([1 + i % 7, 2, 3], i % 2) for i in range(20)]
    blocks = (torch.arange(40 * 16).view(40, 16) + torch.arange(40)[:, None]) % 7
    for on in ("choose", "judge"):
        made.tasks["docs", on] = {"train": blocks[:30], "dev": blocks[30:]}
        made.tasks["word order", on] = {"train": rows, "dev": rows}
    return made


def test_work_does_what_is_missing_and_nothing_twice(shop, monkeypatch):
    monkeypatch.setattr(run, "jobs", few_jobs)
    said = []
    run.work(shop, said.append)
    files = {path.name: path.read_bytes() for path in shop.results.folder.glob("*.jsonl")}
    assert set(files) == {"model.jsonl", "tune.jsonl", "recovery.jsonl"} and len(said) == 5 + 2 * 2 + 2 + 1
    tuned = [json.loads(line) for line in files["tune.jsonl"].splitlines()]
    assert all(0 <= result["accuracy"] <= 100 and result["hardware"] for result in tuned)
    judged = [result for result in tuned if result["key"]["on"] == "judge"]
    assert all(result["curve"] and result["text_loss"] > 0 for result in judged) and len(judged) == 2
    run.work(shop, lambda text: pytest.fail(f"again: {text}"))
    path = shop.results.folder / "tune.jsonl"
    path.write_bytes(files["tune.jsonl"][:-40])  # a kill tears the last line
    shop.results = Results("quick", shop.results.folder.parent)
    said.clear()
    run.work(shop, said.append)
    assert len(said) == 1 and len(path.read_bytes().splitlines()) == len(tuned)


def few_jobs(scale, results):
    """Five models, a search of two rates on two choosing seeds, two runs for the record, one attack."""
    found = [plan.model_job(scale, "dense", 0, results)]
    found += [plan.model_job(scale, "pmp", seed, results) for seed in (0, 1, *plan.CHOOSING)]
    found += [job for jobs in plan.candidates(scale, "pmp", "docs", results).values() for job in jobs]
    known = plan.judged(scale, "pmp", "docs", results)
    found += [job for job in known if job]
    found.append(plan.measure_job(scale, "recovery", "pmp", 0, results, attack="weight magnitude"))
    return found, known.count(None)


def test_what_another_process_is_at_is_left_to_it(shop, monkeypatch):
    monkeypatch.setattr(run, "jobs", few_jobs)
    first = few_jobs(shop.scale, shop.results)[0][0]
    said = []

    def sleep(seconds):
        raise InterruptedError  # nothing but the claimed job is left
    monkeypatch.setattr(run.time, "sleep", sleep)
    with shop.results.claim(first) as mine, pytest.raises(InterruptedError):
        assert mine
        run.work(shop, said.append)
    assert len(said) == 4 + 2 * 2 + 2 + 1 and not any("model: dense, 0" in text for text in said)


def test_results_refuse_other_models_and_models_of_other_text(shop):
    job = plan.model_job(shop.scale, "pmp", 0, shop.results)
    shop.results.append(job, {"weights": "of another", "data": shop.data, "hardware": "a CPU with bf16"})
    with pytest.raises(UserError, match="not the model of the results in .*, which was trained on a CPU with bf16:"):
        shop.release("pmp", 0)
    with pytest.raises(UserError, match="were trained on"):
        run.Workshop(shop.scale, shop.results, shop.work, data="other.txt", device="cpu")


def test_a_model_that_was_trained_with_other_settings_is_refused(shop, monkeypatch):
    monkeypatch.setitem(plan.MODELS, "pmp", plan.Model({"rho": 0.6}))
    with pytest.raises(UserError, match="pmp-0 was trained with other settings"):
        shop.release("pmp", 0)
    monkeypatch.setitem(plan.MODELS, "pmp", plan.Model())
    shop.release("pmp", 0)
    shop.releases, shop.data = {}, "other.txt"
    with pytest.raises(UserError, match="or on other text"):
        shop.release("pmp", 0)


def test_glue_comes_from_a_folder_or_the_network_but_at_scale_quick_from_neither(shop, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "fetch", lambda name, folder: asked.append(name))
    monkeypatch.setattr(run, "standin", lambda *_: "made")
    assert shop.glue("rte") == run.CACHE and asked == ["rte"]
    shop.scale = dataclasses.replace(shop.scale, pmp={"data": "prose"})
    assert shop.glue("rte") == "made"
    shop.glue_dir = "given"
    assert shop.glue("rte") == "given" and asked == ["rte"]


def tuned(shop, arm, task="docs", rate=10.0, epochs=6):
    return run.tune(shop, plan.tune_job(shop.scale, arm, 0, task, rate, epochs, "judge", shop.results))


def test_a_task_is_learned_inside_the_ticket_alone_by_whoever_has_it(shop, monkeypatch):
    bodies, fit = [], run.fit

    def kept(lesson, *args):
        bodies.append(getattr(lesson.model, "body", lesson.model))
        return fit(lesson, *args)
    monkeypatch.setattr(run, "fit", kept)
    release = shop.release("pmp", 0)
    for arm, task in (("pmp", "docs"), ("pmp + mask", "docs"), ("pmp", "word order"), ("pmp + mask", "word order")):
        result = tuned(shop, arm, task)
        moved = differs(bodies[-1], release.body)
        outside = sum(int((moved[name] & ~release.masks[name]).sum()) for name in release.masks)
        assert (outside == 0) == ("mask" in arm) and any(m.any() for m in moved.values())
        assert set(result["curve"]) >= {1, 2, 4}
    assert tuned(shop, "pmp", rate=33.0)["accuracy"] > 60 > tuned(shop, "pmp base", epochs=0)["accuracy"]


def test_choosing_and_judging_have_no_text_in_common(cache, finished, monkeypatch):
    tokenizer = run.Tokenizer.load(finished / "release")
    parts = [run.docs(tokenizer, on, 10, 8, 32) for on in ("choose", "judge")]
    rows = [{tuple(row) for part in found.values() for row in part.tolist()} for found in parts]
    assert len(parts[0]["dev"]) == len(parts[1]["dev"]) == 8 and len(rows[0] & rows[1]) < 3  # boilerplate repeats
    source = SimpleNamespace(id={}, documents=lambda split, start=0: iter(enumerate("abcdefg")))
    halves = [[text for _, text in run.Half(source, which).documents("validation")] for which in (0, 1)]
    assert halves == [list("aceg"), list("bdf")]


def test_recipes_change_what_they_say(flags, tmp_path):
    model = small_model("llama")
    params = dict(model.named_parameters())
    masks = pmp.random_mask(params, 9000, b"m")
    shrinking = recipe.Shrinking(params, masks, 0.0, steps=50)
    before = shrinking.norm()
    for p in params.values():
        p.grad = torch.ones_like(p)
    shrinking.step(1e-3, 1.0)
    assert shrinking.norm() == pytest.approx(0.0055 * before, rel=1e-4)
    constant = recipe.ConstantStage1(params, None, 0.1, lr=1e-2)
    assert constant.weight_decay == 0
    start = copy.deepcopy(model)
    for p in params.values():
        p.grad = torch.ones_like(p)
    constant.step(1e-9, 1.0)
    far = [(p - q).detach().abs().max().item() for p, q in zip(model.parameters(), start.parameters())]
    assert far == pytest.approx([1e-2] * len(far), rel=1e-2)
    with recipe.changed("betas", {}):
        assert pmp.MaskedAdamW({"w": params[next(iter(params))]}, None, 0.0).optimizer.defaults["betas"] == (0.9, 0.999)


# -----------------------------------------------------------------------------
# measurements and attacks


def test_the_loss_beside_the_weights_leaves_them_as_they_were():
    model = small_model("llama")
    before, idx = copy.deepcopy(model), tokens()
    slope = measures.gradient(model, idx, CPU)
    step = -1e-3 / measures.length(slope)
    up, here, down = measures.loss_beside(model, idx, slope, [-step, 0.0, step])
    assert up > here > down and here == model(idx, idx).item()
    assert abs((up - down) / 2e-3 / measures.length(slope) - 1) < 0.05  # the slope is the gradient's length
    assert not any(moved.any() for moved in differs(model, before).values())


def test_auc_by_hand():
    assert measures.auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0, 0.0])) == pytest.approx((3 + 1.5) / 6)
    assert measures.auc(torch.ones(5), torch.ones(4)) == 0.5
    assert measures.auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1


def test_measurements_look_where_they_say(shop, monkeypatch):
    monkeypatch.setattr(measures, "BATCHES", 2)
    release = shop.release("pmp", 0)
    result = measures.landscape(shop, release, release.masks)
    curves = np.array([result["curves"][place] for place in measures.PLACES])  # (places, directions, alphas)
    middle = result["alphas"].index(0.0)
    assert np.ptp(curves[:, :, middle]) == 0  # every line goes through the release itself
    assert (curves != curves[:, :, [middle]]).sum() == curves[:, :, 1:].size
    assert set(result["curvature"]) == set(measures.SCALINGS)
    steps = []
    monkeypatch.setattr(measures, "loss_beside", lambda model, idx, direction, alphas: steps.append(
        (direction, alphas)) or [0.0] * len(alphas))
    assert len(measures.one_step(shop, release, release.masks)["change"]["outsider"]) == 2
    (whole, eta), (ticket, same), (_, longer), (rest, also), _ = steps[:5]
    for name, mask in release.masks.items():
        assert torch.equal(whole[name], ticket[name] + rest[name])
        assert not ticket[name][~mask].any() and not rest[name][mask].any()
    assert eta == same == also and eta[0] == 0 > eta[1]  # one eta, and downhill
    assert longer[2] * measures.length(ticket) == pytest.approx(eta[2] * measures.length(whole))
    found = measures.gradients(shop, release, release.masks)["auc"]
    assert {"all entries", "within tensors", "mlp", "embedding"} <= set(found) and all(
        0 <= value <= 1 for value in found.values())


def test_an_auc_by_kind_tells_what_lies_between_tensors_from_what_lies_within():
    """Each tensor's scores are noise, but the embedding, all ticket but for one weight, has higher ones."""
    rng = torch.Generator().manual_seed(0)
    names = ("embed_tokens.weight", "layers.0.q_proj.weight", "layers.0.mlp.up_proj.weight")
    scores = {name: torch.rand(40, 50, generator=rng) for name in names}
    masks = {name: torch.rand(40, 50, generator=rng) < 0.5 for name in names}
    scores[names[0]] += 1
    masks[names[0]][:] = True
    masks[names[0]][0, 0] = False
    scores[names[0]][0, 0] = 1.5
    found = measures.auc_by_kind(scores, masks)
    assert found["all entries"] > 0.7 and abs(found["without embedding"] - 0.5) < 0.03
    assert abs(found["q"] - 0.5) < 0.04 and abs(found["within tensors"] - 0.5) < 0.04
    assert measures.auc_by_kind({name: mask.float() for name, mask in masks.items()}, masks)["within tensors"] == 1.0


def test_noise_scaled_by_rows_has_the_rows_lengths_and_the_embedding_can_be_left_out():
    p, noise = torch.nn.Parameter(torch.rand(4, 6)), torch.randn(4, 6)
    assert torch.allclose(measures.by_rows("w", noise, p).norm(dim=1), p.norm(dim=1))
    without = measures.SCALINGS["without embedding"]
    assert not without("model.embed_tokens.weight", noise, p).any() and without("mlp.w", noise, p).all()


def test_replaying_the_secret_gives_the_mask_and_another_one_nothing(shop):
    release = shop.release("pmp", 0)
    known = attacks.replay(shop, release, release.masks, secret_of(release.out))
    assert known["entries_recognised"] >= known["frozen"] == sum(int((~mask).sum()) for mask in release.masks.values())
    assert known["iou"] > 0.99 > 0.75 > attacks.replay(shop, release, release.masks, b"another")["iou"]


def test_guesses_at_the_mask_are_better_than_chance_where_they_should_be(shop, monkeypatch):
    release = shop.release("pmp", 0)
    monkeypatch.setitem(attacks.SCORES, "own EarlyBird", partial(attacks.rehearsal_score, steps=5, batches=1))
    names = [name for name in attacks.RECOVERIES if name != "gradient, 100 batches"]
    found = {name: attacks.recovery(shop, release, release.masks, name) for name in names}
    assert all(0 <= found[name]["iou"] <= 1 for name in names if "folder" not in name)
    assert abs(found["random"]["auc"] - 0.5) < 0.01 and found["gradient, 1 batch"]["auc"] > 0.6
    assert found["release folder"]["same_files"] and not found["release folder"]["differing"]
    guess = attacks.guess(shop, release, "constants that never moved")
    for name, mask in guess.items():  # a gain that is not 1 any more was in the ticket
        if "norm" in name:
            assert (release.masks[name] | ~mask | (dict(release.body.named_parameters())[name] == 1)).all()


def test_the_bits_of_a_weight_do_not_tell_who_was_trained(shop, flags, tmp_path):
    """The share of impossible values is the same inside and outside of the ticket, for each std; once it was not."""
    with recipe.old_theta_0():
        pmp.main([*flags, "--out", str(tmp_path / "old-0")])
    shop.known = {}
    new = shop.release("pmp", 0)
    body = run.load_folder(tmp_path / "old-0" / "release", run.FAMILIES)
    masks = pmp.load_mask(tmp_path / "old-0" / "private" / "mask.safetensors", dict(body.named_parameters()))
    old = run.Release("old", 0, tmp_path / "old-0", body, new.tokenizer, masks)
    for release in (old, new):
        kinds = {}
        for name, p in release.body.named_parameters():
            if std := initial_std(release.body, name):
                gaps, mask = attacks.impossible(p, std), release.masks[name]
                inside, outside = kinds.setdefault(std, ([], []))
                inside.append(gaps[mask])
                outside.append(gaps[~mask])
        assert len(kinds) == 2
        for parts in kinds.values():
            inside, outside = (torch.cat(part).double() for part in parts)
            if release is old:
                assert outside.sum() == 0 and inside.mean() > 0.03
            else:
                error = (inside.mean() * (1 / len(inside) + 1 / len(outside))).sqrt()
                assert abs(inside.mean() - outside.mean()) < 5 * error and outside.mean() > 0.03
    pooled = "lattice, with rows and columns"
    assert attacks.recovery(shop, old, old.masks, pooled)["auc"] > 0.7
    assert abs(attacks.recovery(shop, new, new.masks, pooled)["auc"] - 0.5) < 0.1


def test_the_check_of_the_release_folder_can_fail(shop, tmp_path):
    release = shop.release("pmp", 0)
    shutil.copytree(release.out, tmp_path / "told")
    config = tmp_path / "told" / "release" / "config.json"
    config.write_text(config.read_text().replace("{", '{"rho": 0.7,', 1))
    release.out = tmp_path / "told"
    assert attacks.leak(shop, release)["differing"] == ["config.json"]


def test_each_adversary_changes_what_it_says(shop, monkeypatch):
    monkeypatch.setitem(attacks.SCORES, "own EarlyBird", partial(attacks.rehearsal_score, steps=2, batches=1))
    outsiders = [how for how in plan.DETERMINED]
    assert len(set(outsiders)) == len(outsiders) >= 27
    release = shop.release("pmp", 0)
    for how in outsiders:
        adversary = attacks.ADVERSARIES[how]
        masks = adversary.mask and adversary.mask(shop, release)
        body = copy.deepcopy(release.body)
        if adversary.change and "continue" not in str(adversary.change):
            shop.known.clear()  # so that a guess at the mask is made, which may train
            adversary.change(shop, release, body)
            assert any(moved.any() for moved in differs(body, release.body).values()), how
        if adversary.method != "full":
            continue
        params, before = dict(body.named_parameters()), copy.deepcopy(body)
        optimizer = adversary.optimizer(params, masks, 0.0, (0.9, 0.999))
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-3, 1.0)
        moved = differs(body, before)
        outside = sum(int((moved[name] & ~masks[name]).sum()) for name in masks) if masks else 0
        assert any(m.any() for m in moved.values()) and outside == 0, how
        if how == "attention alone":
            assert {name for name, m in moved.items() if m.any()} == {name for name in params if "attn" in name}
    for how, updates in (("LoRA, rank 4", 7), ("full, three times the epochs", 21)):
        assert tuned(shop, f"pmp: {how}", epochs=1)["updates"] == updates


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rescaled_weights_are_the_same_function(family):
    model = small_model(family)
    body, idx = copy.deepcopy(model), tokens()
    attacks.rescale(None, None, body)
    moved = {name for name, m in differs(body, model).items() if m.any()}
    assert len(moved) > 4 and torch.allclose(body(idx), model(idx), atol=1e-4)


def test_lion_steps_by_the_sign_and_a_step_that_is_not_finite_changes_nothing():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    lion = attacks.other(attacks.Lion)({"layers.0.w": p}, None, 0.0, None)
    p.grad = torch.tensor([0.5, -0.1, 0.0])
    lion.step(0.01, 1.0)
    assert p.tolist() == pytest.approx([0.99, 2.01, 3.0])
    p.grad = torch.tensor([math.nan, 0.0, 0.0])
    with pytest.raises(FloatingPointError):
        lion.step(0.01, 1.0)
    assert p.tolist() == pytest.approx([0.99, 2.01, 3.0])


# -----------------------------------------------------------------------------
# verdicts


def test_students_t_by_the_book():
    assert verdicts.quantile(3) == pytest.approx(4.303, abs=2e-3)
    assert verdicts.quantile(8) == pytest.approx(2.365, abs=1e-3)
    assert verdicts.two_sided(2.571, 6) == pytest.approx(0.05, abs=1e-4) and verdicts.two_sided(0, 5) == 1
    found = verdicts.marker("x", [1.0, 2.0, 3.0])
    assert found.estimate == 2 and found.half == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert found.p == pytest.approx(verdicts.two_sided(2 * 3**0.5, 3))


def test_holms_correction_by_hand():
    rows = [verdicts.Row("a", [verdicts.Marker("x", estimate=1.0, p=p)]) for p in (0.01, 0.02, 0.04)]
    rows.append(verdicts.Row("b", [verdicts.Marker("x", estimate=-1.0, p=0.001)]))
    verdicts.correct(rows)  # 0.004, 0.03, 0.04, 0.04
    assert [row.verdict for row in rows] == ["holds"] * 3 + ["does not hold"]
    rows = [verdicts.Row("a", [verdicts.Marker("x", estimate=1.0, p=p) for p in (0.03, 0.03)])]
    assert verdicts.correct(rows)[0].verdict == "open"  # 0.06


def test_what_would_decide_an_open_test_decides_it():
    values = [-0.5, 1.0, 1.3, -0.2]  # a mean of 0.4, 0.92 standard errors above 0
    found = verdicts.marker("x", values)
    found.tests = 10
    enough = found.enough()
    assert 20 < enough < 100
    for n, decided in ((enough, True), (enough - 1, False)):
        t = 0.4 / (np.std(values, ddof=1) / n**0.5)
        assert (2 * 10 * verdicts.two_sided(t, n) < 0.05) == decided  # a second look at it
    many = [verdicts.marker("x", np.array([0.9, 1.0, 1.1, 1.0]) * mean) for mean in (100.0, 50.0, -80.0)]
    many += [verdicts.marker("x", np.array([-1.0, 0.0, 1.0, 2.0]) + shift) for shift in (0.0, 0.5, 1.2)]
    verdicts.correct([verdicts.Row("a", many)])
    assert [one.verdict for one in many] == ["holds"] * 2 + ["does not hold"] + ["open"] * 3
    assert [one.tests for one in many[3:]] == [3] * 3 and all(one.enough() > 4 for one in many[3:])
    assert verdicts.marker("x", [1.0, -1.0, 0.01]).enough() == verdicts.MOST + 1


def test_a_row_can_be_mixed_and_below_counts_as_for_the_claim():
    def of(*found):
        return verdicts.Row("a", [verdicts.Marker("x", verdict=one) for one in found]).verdict
    assert of("holds", "does not hold", "open") == "mixed" and of("holds", "open") == "open"
    assert of("does not hold", "open") == "does not hold" and of("holds", "not run") == "partly run"
    assert of("not run") == of() == "not run" and of("holds", "unfinished") == "partly run"
    assert verdicts.marker("x", [1.0, 1.1, 1.2], planned=8).verdict == "unfinished"
    assert of("tells nothing") == "tells nothing"
    below = verdicts.Marker("x", estimate=0.02, margin=0.05, above=False, p=0.001)
    below.judge(0.01)
    assert below.verdict == "holds"


def test_a_planted_effect_is_found_and_none_where_there_is_none():
    def planted(job):
        result = no_effect(job)
        if job.kind == "tune" and job.what["arm"] in ("pmp", "untied-pmp"):
            result["accuracy"] -= 10
        return result
    nothing = {row.claim.split()[0]: row.verdict for row in verdicts.claims(Made(no_effect))}
    assert "holds" not in [nothing[number] for number in ("3", "5", "6", "8", "9", "11", "12", "18")]
    assert nothing["1"] == "holds" and nothing["3"] == "does not hold" and nothing["17"] == "holds"
    found = {row.claim.split()[0]: row for row in verdicts.claims(Made(planted))}
    assert [found[number].verdict for number in ("3", "5", "6", "8")] == ["holds"] * 4
    assert found["3"].markers[0].estimate == pytest.approx(100 / 3, abs=3)  # ten points of a gain of thirty


def test_a_task_on_which_an_arm_gains_nothing_tells_nothing_of_it():
    def weak(job):  # LoRA ends 20 points below random weights, and 10 higher with the mask
        result = no_effect(job)
        if job.kind == "tune" and "lora" in job.what["arm"]:
            result["accuracy"] -= 40 if "mask" in job.what["arm"] else 50
        return result
    rows = {row.claim.split()[0]: row for row in verdicts.claims(Made(weak))}
    for number in ("4", "7"):
        assert rows[number].verdict == "tells nothing"
        assert [verdicts.spell(one) for one in rows[number].markers] == ["docs: tells nothing",
                                                                         "word order: tells nothing"]


def test_the_error_of_a_contrast_has_the_error_of_the_choice():
    def two(job, seeds_agree):
        if job.kind != "tune":
            return no_effect(job)
        if job.what["on"] == "judge":
            return {"accuracy": 80.0 + 0.01 * (job.what["seed"] % 8)}
        best, slope = (8.0, 4) if seeds_agree or job.what["seed"] == 100 else (2.0, 2)
        return {"accuracy": 80 - slope * abs(math.log2(job.what["rate"] / best))}
    errors = [verdicts.Evidence(Made(lambda job: two(job, agree))).contrast({"pmp": 1}, "docs")[1]
              for agree in (True, False)]
    assert errors[0] < 0.02 and errors[1] > 0.5


def test_adversaries_of_both_models_share_the_error_of_their_common_choice():
    """The best rate of each model alone is the same for both seeds; that of their mean is not."""
    at_best = {("dense", 208): (80, 70), ("dense", 209): (80, 79), ("pmp", 208): (79, 80), ("pmp", 209): (69, 80)}

    def two(job):
        what = job.what
        if what.get("on") != "choose" or what["arm"] not in plan.OUTSIDERS:
            return no_effect(job)
        low, high = at_best[what["arm"].split(":")[0], what["seed"]]
        return {"accuracy": {0.5: low, 1.0: 0, 2.0: high}[what["rate"] / best]}
    best = plan.choice(plan.SCALES["laptop"], "pmp", "docs", Made(no_effect))[0]
    evidence = verdicts.Evidence(Made(two))
    assert plan.choice(evidence.scale, "pmp: Lion", "docs", evidence.results)[0] == 2 * best
    assert evidence.contrast({"dense: Lion": 1, "pmp: Lion": -1}, "docs")[1] > 2


def test_updates_to_reach_a_goal_by_hand():
    assert verdicts.to_reach({"1": 0.0, "2": 10.0}, 4, 20.0, 10.0) == 2
    assert verdicts.to_reach({"1": 0.0, "2": 10.0}, 4, 20.0, 15.0) == pytest.approx(2 * 2**0.5)
    assert verdicts.to_reach({"1": 0.0, "2": 10.0}, 4, 20.0, 30.0) == 8
    assert verdicts.to_reach({"1": 5.0}, 2, 6.0, 1.0) == 1


# -----------------------------------------------------------------------------
# the report, and the command lines


class NoPicture:
    """Stands for matplotlib, which the tests do without: takes every call, as one axis or as many."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: NoPicture()

    def __iter__(self):
        return iter([self] * 3)

    def __getitem__(self, index):
        return self

    def __setitem__(self, index, value):
        pass


def test_every_table_and_picture_is_made_of_results_alone(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(pictures, "subplots", lambda *size, **options: (NoPicture(), NoPicture()))
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(path.name))
    evidence = verdicts.Evidence(Made(no_effect))
    tables = {name: table(evidence) for name, table in report.TABLES.items()}
    assert tables["verdicts"].count("\n| ") == 1 + 23 and "| full, PMP | " in tables["table1"]
    assert "| Lion |" in tables["adversaries"] or len(tables["adversaries"].splitlines()) == 2 + 10
    for name, draw in pictures.ALL.items():
        assert pictures.there(evidence, name)
        draw(evidence, tmp_path / f"{name}.png")
    assert len(drawn) == len(pictures.ALL)
    empty = verdicts.Evidence(Made(no_effect, known=("none",)))  # nothing has been run yet
    assert all(isinstance(table(empty), str) for table in report.DOCUMENT.values())
    assert {row.verdict for row in verdicts.claims(empty.results)} == {"not run"}
    assert report.undecided(empty) == "None is open."
    assert not any(word in report.verdicts(empty) for word in ("nan", "tells nothing"))


def test_differences_are_within_pairs_and_can_leave_out_those_with_unlike_losses():
    def worse(job):  # PMP by 5 points, and by 30 where its pre-training went badly
        result = no_effect(job)
        bad = job.what["seed"] == 200
        if job.kind == "model" and job.what["model"] == "pmp":
            result["text_loss"] += 0.2 * bad
        if job.kind == "tune" and job.what["arm"] == "pmp":
            result["accuracy"] -= 30 if bad else 5
        if job.kind == "tune" and job.what["epochs"] == 8:  # so that all arms choose what equal rates have
            result["accuracy"] += 5
        return result
    evidence, weights = verdicts.Evidence(Made(worse)), {"dense": 1, "pmp": -1}
    runs = {arm: evidence.equal(arm)[4.0] for arm in weights}
    everything, alike = (list(evidence.differences(runs, weights, close).values()) for close in (False, True))
    assert [round(value / 5) for value in everything] == [6] + [1] * 7 and alike == everything[1:]
    assert evidence.differences({**runs, "pmp": {200: runs["pmp"][200]}}, weights) == {200: everything[0]}
    table = report.gaps(evidence)
    assert "| dense - outsider, losses alike | " in table and "random mask - outsider | " in table
    assert "authorised - outsider, losses alike" not in table  # that is one and the same model
    line = next(line for line in report.ingredients(evidence).splitlines() if line.startswith("| PMP - dense "))
    nats, _, _, points, rate, pairs = line.strip("| ").split(" | ")[1:]
    assert float(nats.split()[0]) == pytest.approx(0.2 / 16, abs=2e-3) and (rate, pairs) == ("2 x", "13")
    assert float(points.split()[0]) == pytest.approx(-(12 * 5 + 30) / 13, abs=0.5)
    assert "| outsider / dense | " in report.forgetting(evidence)


def test_the_best_rate_for_the_others_is_chosen_without_the_pair_that_it_judges():
    def runs(*scores):
        return {seed: {"accuracy": score} for seed, score in enumerate(scores)}
    found = verdicts.best_for_others({1.0: runs(1.0, 2.0, 9.0), 2.0: runs(3.0, 3.0, 3.0)})
    assert verdicts.accuracies(found) == {0: 1.0, 1: 2.0, 2: 3.0}
    assert verdicts.best_for_others({1.0: runs(1.0), 2.0: runs(3.0, 3.0)}) == {}  # one pair has no others

    def held_back(job):  # by 5 points at every rate; the rate itself matters more
        result = no_effect(job)
        if job.kind == "tune" and job.what["arm"] in ("pmp", "literal-pmp") and job.what["on"] == "judge":
            result["accuracy"] -= 5
        return result

    def equal(result):  # {row's number: its markers at equal rates}
        return {row.claim.split()[0]: found for row in verdicts.claims(Made(result))
                if (found := [one for one in row.markers if "equal rates" in one.label or "all at" in one.label])}
    rows = equal(held_back)
    assert [one.verdict for one in rows["3"] + rows["19"]] == ["holds"] * 3
    assert rows["3"][0].estimate == pytest.approx(100 * 5 / 30, abs=3)
    rows = equal(no_effect)
    assert rows["3"][0].verdict == "does not hold" and rows["6"][0].verdict == "open"
    row = next(row for row in verdicts.claims(Made(held_back)) if row.claim.startswith("3"))
    assert row.markers[0].label == "docs, own rates" and row.markers[0].verdict == "tells nothing"


def test_the_tables_in_the_readme_are_what_the_results_say():
    evidence = verdicts.Evidence(Results("laptop").refresh())
    text = (HERE / "README.md").read_text()
    assert all(f"<!-- {name} -->" in text for name in report.DOCUMENT)
    assert report.filled(text, evidence) == text, "run: python experiments/report.py --scale laptop --write"


def test_a_run_is_drawn_and_its_density_stays_private(finished, monkeypatch, tmp_path, capsys):
    names = []
    monkeypatch.setattr(plot, "subplots", lambda *shape, **options: (
        NoPicture(), [NoPicture()] * 2 if shape else NoPicture()))
    monkeypatch.setattr(plot, "save", lambda figure, path, mode=0o644: names.append((path, mode)))
    plot.main([str(finished), str(finished)])
    private = finished / "private" / "density.png"
    assert names == [(finished / "runs.png", 0o600), (private, 0o600), (private, 0o600)]
    log = plot.read_log(finished)
    assert log["I"]["iou"].shape == (2, 2) and log["II"]["val_loss"][0].tolist() == [3, 6]
    (tmp_path / "log.jsonl").write_text((finished / "log.jsonl").read_text() + '{"stage": "II", "st')
    assert plot.read_log(tmp_path)["II"]["loss"].shape == (2, 6)
    bad(tmp_path / "nowhere", expect="there is no folder", capsys=capsys, main=plot.main)
    (tmp_path / "log.jsonl").write_text("")
    bad(tmp_path, expect="has no step yet", capsys=capsys, main=plot.main)


def test_bad_flags_of_an_experiment_are_one_sentence(capsys, tmp_path):
    for main in (run.main, report.main):
        bad("--scale", "huge", expect="huge", capsys=capsys, main=main)
        bad("--scael", "laptop", expect="--scael", capsys=capsys, main=main)
    bad("--results", tmp_path, expect="no result", capsys=capsys, main=report.main)
    bad("--device", "warp", "--results", tmp_path, "--work", tmp_path, expect="warp", capsys=capsys, main=run.main)
