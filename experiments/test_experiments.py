"""What the experiments promise. The helpers and the small runs are those of test_pmp.py."""

import copy
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402

# pytest finds the fixtures of test_pmp.py under the names that are imported here
from test_pmp import (CPU, SETTINGS, bad, cache, corpus, differs, finished, flags, secret_of, small_model,  # noqa: E402
                      standin, tokens)
import attacks  # noqa: E402
import common  # noqa: E402
import figure2  # noqa: E402
import figure3  # noqa: E402
import figure4  # noqa: E402
import figure5  # noqa: E402
import figure6  # noqa: E402
import plot  # noqa: E402
import pmp  # noqa: E402
import proposition1  # noqa: E402
import table1  # noqa: E402
import torch  # noqa: E402
import verdicts  # noqa: E402
from glue import merge_lora  # noqa: E402
from runtime.files import UserError  # noqa: E402

__all__ = ["cache", "corpus", "finished", "flags", "standin"]


@pytest.fixture(scope="session")
def models(finished, flags, tmp_path_factory):
    """A work folder with three pre-trainings of each kind, which are the same one."""
    work = tmp_path_factory.mktemp("work")
    pmp.main([*flags, "--rho", "1.0", "--out", str(work / "dense-0")])
    shutil.copytree(finished, work / "pmp-0")
    for seed in (1, 2):
        (work / f"dense-{seed}").symlink_to(work / "dense-0")
        (work / f"pmp-{seed}").symlink_to(work / "pmp-0")
    return work


@pytest.fixture
def nano(models, standin, tmp_path, monkeypatch):
    """The flags of a script at a scale of seconds, and its results folder."""
    scale = common.Scale({}, ("rte",), ("rte",), rows={"rte": 16}, select=16, rates=(1.0, 3.0), epochs=(1, 2),
                         batch_size=8, max_length=32, text_blocks=4)
    monkeypatch.setitem(common.SCALES, "quick", scale)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "quick").symlink_to(models)
    return ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--glue-dir", str(standin),
            "--device", "cpu"]


def lab_of(nano):
    found = []
    common.run(lambda lab: found.append(lab) or "", "a test", nano)
    (lab,) = found
    lab.public = lambda index: lab.text[0].read(2 * index, 2, 32)  # less text than an attacker would take
    return lab


def test_a_script_runs_what_its_results_lack_and_nothing_twice(nano, capsys):
    common.run(table1.script, "a test", nano)
    lab = lab_of(nano)
    lines = lab.path("finetune.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert all(result["hardware"] and result["weights"] and "lr" in result for result in results)
    arms = {(r["key"]["model"], r["key"]["adversary"]) for r in results if r["key"]["on"] == "dev"}
    assert arms == {(variant, stage.name) for stage, variant, _ in table1.STAGES}
    first = capsys.readouterr().out.split("| stage")[-1]
    lab.path("finetune.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # a kill tears the last line
    common.run(table1.script, "a test", nano)
    assert capsys.readouterr().out.split("| stage")[-1].splitlines()[:2] == first.splitlines()[:2]
    again = lab.path("finetune.jsonl").read_text().splitlines()
    assert again[:-1] == lines[:-1] and json.loads(again[-1])["key"] == json.loads(lines[-1])["key"]


def test_a_run_is_drawn_and_its_density_stays_private(finished, monkeypatch, tmp_path, capsys):
    names = []
    monkeypatch.setattr(plot, "subplots", lambda *shape, **options: (
        NoPicture(), [NoPicture()] * 2 if shape else NoPicture()))
    monkeypatch.setattr(plot, "save", lambda figure, path, mode=0o644: names.append((path, mode)))
    plot.main([str(finished), str(finished)])
    private = finished / "private" / "density.png"
    assert names == [(finished / "run.png", 0o644), (private, 0o600), (private, 0o600)]
    log = plot.read_log(finished)
    assert log["I"]["iou"].shape == (2, 2) and log["II"]["val_loss"][0].tolist() == [3, 6]
    (tmp_path / "log.jsonl").write_text((finished / "log.jsonl").read_text() + '{"stage": "II", "st')
    assert plot.read_log(tmp_path)["II"]["loss"].shape == (2, 6)
    bad(tmp_path / "nowhere", expect="there is no folder", capsys=capsys, main=plot.main)
    (tmp_path / "log.jsonl").write_text("")
    bad(tmp_path, expect="has no step yet", capsys=capsys, main=plot.main)


class NoPicture:
    """Stands for matplotlib, which the tests do without: takes every call, as one axis or as many."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def __iter__(self):
        return iter([self] * 3)

    def __getitem__(self, index):
        return self


@pytest.fixture
def drawn(monkeypatch):
    """The names of the pictures that were drawn."""
    names = []
    for script in (figure2, figure3, figure4, figure5, figure6, proposition1):
        monkeypatch.setattr(script, "subplots", lambda *size, **options: (NoPicture(), NoPicture()))
        monkeypatch.setattr(script, "picture", lambda lab, name, figure: names.append(name))
    return names


def test_figures_2_to_4_have_each_arm_at_its_place(nano, drawn, monkeypatch):
    lab = lab_of(nano)
    monkeypatch.setattr(lab, "losses", lambda variant: [math.log(2.0 + list(common.VARIANTS).index(variant))] * 3)
    monkeypatch.setattr(lab, "scores", lambda variant, task, adversary, *_: [
        float(list(common.VARIANTS).index(variant)) + 10 * (adversary.name == "full") + i for i in range(3)])
    monkeypatch.setattr(lab, "tune", lambda variant, pair, task, adversary, rate, epochs: {
        "scores": {"RTE": {"last": {"accuracy": rate + 10 * epochs + 100 * (variant == "pmp")}}}})
    two = figure2.script(lab)
    assert "| EarlyBird | 1.10 ±0.00 | 3.0 | 2.00 ±1.00 | 12.00 ±1.00 |" in two
    assert "| random mask | 1.39 ±0.00 | 4.0 | 3.00 ±1.00 | 13.00 ±1.00 |" in two
    assert "| outsider, full | 12.00 ±1.00 |" in figure3.script(lab)
    ratios, rates, epochs = figure4.script(lab).split("\n\n")
    assert ratios.splitlines()[3] == ("| fine-tuned | 11.00 ±1.00 | 16.00 ±1.00 | 17.00 ±1.00 | 12.00 ±1.00 | "
                                      "18.00 ±1.00 | 19.00 ±1.00 |")
    assert "| PMP | 111.0 ±0.00 | 113.0 ±0.00 |" in rates and "| without PMP | 13.00 ±0.00 | 23.00 ±0.00 |" in epochs
    assert drawn == ["figure2", "figure3", "figure4"]


def test_figures_5_and_6_and_the_proposition_look_where_they_say(nano, drawn, monkeypatch):
    monkeypatch.setattr(common, "SEEDS", 1)
    monkeypatch.setattr(figure5, "DIRECTIONS", 2)
    monkeypatch.setattr(proposition1, "BATCHES", 2)
    monkeypatch.setattr(proposition1, "SIZES", [1e-6, 1e-3])  # 1e-5 is not always a small step
    lab = lab_of(nano)
    text = lab.held_out()[:2]
    monkeypatch.setattr(lab, "held_out", lambda: text)
    lab.tasks["docs"] = {"train": text.repeat(16, 1).cpu()}
    for script, name in ((figure5, "landscape"), (figure6, "gradients"), (proposition1, "one_step")):
        assert "| pmp |" in script.script(lab)
        assert len(lab.read(name)) == 2  # a PMP model and a dense one
    assert drawn == ["figure5", "figure6", "proposition1"]
    for result in lab.read("landscape").values():
        curves = np.array([result["curves"][place] for place in figure5.PLACES])  # (places, directions, alphas)
        middle = result["alphas"].index(0.0)
        assert np.ptp(curves[:, :, middle]) == 0  # every line goes through the release itself
        assert (curves != curves[:, :, [middle]]).sum() == curves[:, :, 1:].size
    for result in lab.read("one_step").values():
        whole, ticket, rest = (np.array(result["change"][arm]) for arm in ("outsider", "authorised", "complement"))
        assert whole[:, 0] == pytest.approx(ticket[:, 0] + rest[:, 0], rel=0.2)  # a small step is nearly linear


def test_the_search_takes_the_best_rate_and_sees_no_row_that_it_is_scored_on(nano, monkeypatch):
    lab, seen = lab_of(nano), []

    def tune(variant, pair, task, adversary, rate, epochs, on="dev"):
        seen.append((pair, rate, epochs, on))
        return {"scores": {"RTE": {"last": {"accuracy": 50 + 10 * (rate == best) - epochs}}}}
    monkeypatch.setattr(lab, "tune", tune)
    for best, further in ((3.0, [9.0]), (1.0, [1 / 3])):  # it lies at an end, so that a rate beyond is tried too
        seen.clear()
        assert lab.search("pmp", "rte", common.FULL) == (best, 1)
        assert seen == [((0, 0), rate, 1, "select") for rate in [1.0, 3.0, *further]] + [((0, 0), best, 2, "select")]
    data = lab.task("rte", lab.release("pmp").tokenizer)
    assert len(data["select"]) == 16 and len(data["train"]) == 48 and len(data["dev"]) == 40


def test_what_another_process_is_at_work_on_is_left_to_it(nano):
    lab = lab_of(nano)
    ran = lab.once("some", {"a": 1}, lambda: {"inner": lab.once("some", {"a": 1}, lambda: {"b": 2})})
    assert ran["inner"] is None  # the outer call holds the claim
    assert lab.once("some", {"a": 1}, lambda: pytest.fail("it is done already"))["key"] == {"a": 1}


def test_results_refuse_other_models_and_models_of_other_text(nano):
    lab, path = lab_of(nano), lab_of(nano).path("models.jsonl")
    lab.release("pmp")
    mine = json.loads(path.read_text())
    path.write_text(json.dumps({**mine, "weights": "of another"}) + "\n")
    with pytest.raises(UserError, match="not the model of the results"):
        lab.recognise(lab.release("pmp"))
    path.write_text(json.dumps({**mine, "key": {"model": "dense", "pretrain_seed": 0}, "data": "other.txt"}) + "\n")
    with pytest.raises(UserError, match="on other.txt: name other --results"):
        lab.recognise(lab.release("pmp"))


def test_other_text_is_learned_inside_the_ticket_alone_by_whoever_has_it():
    model = small_model("llama")
    masks = pmp.random_mask(dict(model.named_parameters()), 9000, b"m")
    blocks = (torch.arange(40 * 16).view(40, 16) + torch.arange(40)[:, None]) % 7
    data = {"train": blocks[:30], "dev": blocks[30:]}
    settings = dataclasses.replace(SETTINGS, lr=1e-2, epochs=6)
    for method, own in (("full", None), ("full", masks), ("lora", masks)):
        body = copy.deepcopy(model)
        result, _ = common.adapt(body, data, method, 0, settings, CPU, own)
        if method == "lora":
            merge_lora(body)
        outside = sum(int((differs(body, model)[name] & ~masks[name]).sum()) for name in masks)
        assert (outside == 0) == bool(own) and result["updates"] == 6 * 15
        if method == "full":
            assert result["scores"]["docs"]["last"]["accuracy"] > 80


def test_the_loss_beside_the_weights_leaves_them_as_they_were():
    model = small_model("llama")
    before, idx = copy.deepcopy(model), tokens()
    slope = common.gradient(model, idx, CPU)
    step = -1e-3 / common.length(slope)
    up, here, down = common.loss_beside(model, idx, slope, [-step, 0.0, step])
    assert up > here > down and here == model(idx, idx).item()
    assert abs((up - down) / 2e-3 / common.length(slope) - 1) < 0.05  # the slope is the gradient's length
    assert not any(moved.any() for moved in differs(model, before).values())


def test_auc_by_hand():
    assert attacks.auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0, 0.0])) == pytest.approx((3 + 1.5) / 6)
    assert attacks.auc(torch.ones(5), torch.ones(4)) == 0.5
    assert attacks.auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1


def test_replaying_the_secret_gives_the_mask_and_another_one_nothing(nano):
    lab = lab_of(nano)
    masks = lab.release("pmp").masks
    known = attacks.replay(lab, "pmp", secret_of(lab.release("pmp").out))
    assert known["entries_recognised"] >= known["frozen"] == sum(int((~mask).sum()) for mask in masks.values())
    assert known["iou"] > 0.99 > 0.75 > attacks.replay(lab, "pmp", b"another")["iou"]


def test_guesses_at_the_mask_are_better_than_chance_where_they_should_be(nano):
    lab = lab_of(nano)
    for name in attacks.SCORES:
        assert 0 <= attacks.recovery(lab, name, 0)["iou"] <= 1
    assert abs(attacks.recovery(lab, "random", 0)["auc"] - 0.5) < 0.01
    assert attacks.recovery(lab, "gradient, 1 batch", 0)["auc"] > 0.6
    guess = attacks.guess(lab, lab.release("pmp"), "constants that never moved")
    for name, mask in guess.items():  # a gain that is not 1 any more was in the ticket
        if "norm" in name:
            assert (lab.release("pmp").masks[name] | ~mask | (dict(
                lab.release("pmp").body.named_parameters())[name] == 1)).all()


def test_the_bits_of_a_weight_do_not_tell_who_was_trained(nano, flags, models, tmp_path):
    """The share of impossible values is the same inside and outside of the ticket, for each std; once it was not."""
    with common.old_theta_0():
        pmp.main([*flags, "--out", str(models / "old-0")])
    lab = lab_of(nano)
    for variant in ("old", "pmp"):
        release = lab.release(variant)
        kinds = {}
        for (name, p), std in zip(release.body.named_parameters(), attacks.exact_spread(release).values()):
            if std:
                gaps, mask = attacks.impossible(p, std), release.masks[name]
                inside, outside = kinds.setdefault(std, ([], []))
                inside.append(gaps[mask])
                outside.append(gaps[~mask])
        assert len(kinds) == 2
        for parts in kinds.values():
            inside, outside = (torch.cat(part).double() for part in parts)
            if variant == "old":
                assert outside.sum() == 0 and inside.mean() > 0.03
            else:
                error = (inside.mean() * (1 / len(inside) + 1 / len(outside))).sqrt()
                assert abs(inside.mean() - outside.mean()) < 5 * error and outside.mean() > 0.03
    found = attacks.recovery(lab, "lattice, with rows and columns", 0, "old")
    assert found["auc"] > 0.7
    assert abs(attacks.recovery(lab, "lattice, with rows and columns", 0)["auc"] - 0.5) < 0.1


def test_the_release_folder_holds_nothing_of_the_mask_and_the_check_can_fail(nano, tmp_path, models):
    lab = lab_of(nano)
    leak = attacks.leak(lab)
    assert leak["same_files"] and leak["same_header"] and not leak["differing"]
    shutil.copytree(models / "pmp-0", tmp_path / "told")
    config = tmp_path / "told" / "release" / "config.json"
    config.write_text(config.read_text().replace("{", '{"rho": 0.7,', 1))
    lab.release("pmp").out = tmp_path / "told"
    assert attacks.leak(lab)["differing"] == ["config.json"]


def test_there_are_27_adversaries_and_each_changes_what_it_says(nano):
    outsiders = attacks.PLAIN + attacks.SUSPICIOUS
    assert len({adversary.name for adversary in outsiders}) == len(outsiders) >= 27
    lab = lab_of(nano)
    release = lab.release("pmp")
    for adversary in outsiders:
        masks = adversary.mask and adversary.mask(lab, release)
        body = copy.deepcopy(release.body)
        if adversary.change and "continue" not in str(adversary.change):
            adversary.change(lab, release, body)
            assert any(moved.any() for moved in differs(body, release.body).values()), adversary.name
        if adversary.method != "full":
            continue
        params, before = dict(body.named_parameters()), copy.deepcopy(body)
        optimizer = adversary.optimizer(params, masks, 0.0, (0.9, 0.999))
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-3, 1.0)
        moved = differs(body, before)
        outside = sum(int((moved[name] & ~masks[name]).sum()) for name in masks) if masks else 0
        assert any(m.any() for m in moved.values()) and outside == 0, adversary.name
        if adversary.name == "attention and head":
            assert {name for name, m in moved.items() if m.any()} == {
                name for name in params if "attn" in name or "head" in name}


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


def test_a_verdict_needs_the_whole_interval_on_one_side():
    assert verdicts.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.30 / 3**0.5))
    assert verdicts.judge([(2.0, 1.0)]) == "**holds**"
    assert verdicts.judge([(2.0, 3.0)]) == "**cannot tell**"
    assert verdicts.judge([(-2.0, 1.0)]) == "**does not hold**"
    assert verdicts.judge([(20.0, 1.0), (-5.0, 1.0)]) == "**does not hold**"


def test_the_verdicts_in_the_readme_are_what_the_results_say(capsys, monkeypatch):
    monkeypatch.setattr(common.Lab, "release", lambda lab, *what: pytest.fail(f"the results lack some of {what}"))
    common.run(verdicts.script, "a test", ["--scale", "laptop", "--device", "cpu"])
    table = capsys.readouterr().out.split("\n\n")[-1].strip()
    assert table.startswith("| claim of the paper") and table in (HERE / "README.md").read_text()


def test_bad_flags_of_an_experiment_are_one_sentence(capsys, tmp_path):
    def main(argv):
        common.Lab(common.parse(argv, "a test"))
    bad("--scale", "huge", expect="huge", capsys=capsys, main=main)
    bad("--scael", "laptop", expect="--scael", capsys=capsys, main=main)
    bad("--device", "warp", "--results", tmp_path, "--work", tmp_path, expect="warp", capsys=capsys, main=main)
