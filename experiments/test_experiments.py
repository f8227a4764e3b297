"""What the study's scripts promise, on made-up text and lines. Needs scipy, scikit-learn and matplotlib, no network."""

import json
import math
import os
import random
import shutil
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch starts

import attack
import measure
import numpy as np
import plot
import pytest
import report
import study
import torch

import pmp
from common import UserError
from model import LlamaConfig, build, initialise, load_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs with PMP, of the same shape and text and with other secrets, and a dense twin of the first."""
    folder = tmp_path_factory.mktemp("runs")
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "bdklmnprst" for b in ("a", "eck", "ing", "om", "uth")]
    texts = [" ".join(rng.choices(words, weights=range(1, 51), k=80)) for _ in range(6000)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["--preset", "mini-untied", "--data", str(folder / "text.jsonl"), "--cache", str(folder / "cache"),
            "--steps", "40", "--eb-steps", "5", "--block-size", "64", "--val-blocks", "4", "--device", "cpu", "--lr",
            "3e-3"]
    for name in ("victim", "shadow"):
        pmp.main([*argv, "--out", str(folder / name)])
    pmp.main(["--twin", str(folder / "victim"), "--rho", "1", "--cache", str(folder / "cache"), "--out",
              str(folder / "dense")])
    return folder


def test_the_attack_finds_more_than_chance_and_its_guess_is_a_mask_file(runs, tmp_path, capsys, monkeypatch):
    guess = tmp_path / "guess.safetensors"
    monkeypatch.setattr(attack, "SAMPLE", 20_000)
    monkeypatch.setattr(attack, "BATCHES", 3)
    monkeypatch.setattr(sys, "argv", ["attack.py", str(runs / "victim/release"), "--shadow", str(runs / "shadow"),
                                      "--mask", str(runs / "victim/private/mask.safetensors"), "--guess", str(guess),
                                      "--cache", str(runs / "cache")])
    attack.main()
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: float(line.split()[1].strip("%")) for line in lines[-4:]}
    assert found["classifier"] > found["gradient"] > 70
    assert found["shadow"] > 72
    params = dict(load_folder(runs / "victim/release")[0].named_parameters())
    mask = pmp.load_mask(guess, params)
    assert sum(int(part.sum()) for part in mask.values()) == math.floor(0.7 * sum(p.numel() for p in params.values()))


def test_runs_are_compared_in_a_table_and_a_picture_for_the_owner_alone(runs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot.py", str(runs / "victim"), str(runs / "dense")])
    plot.main()
    assert capsys.readouterr().out.split()[:4] == ["run", "rho", "loss", "val"]
    assert (runs / "victim" / "run.png").stat().st_mode & 0o777 == 0o600


def test_a_shadow_without_a_mask_is_refused(runs):
    with pytest.raises(UserError, match="no finished run with a ticket of its own"):
        attack.attack(*load_folder(runs / "victim/release"), [runs / "dense"], runs / "cache")


def test_shadows_of_two_sizes_are_refused(runs, monkeypatch):
    pmp.main(["--twin", str(runs / "shadow"), "--rho", "0.5", "--steps", "2", "--cache", str(runs / "cache"), "--out",
              str(runs / "half")])
    monkeypatch.setattr(attack, "SAMPLE", 2_000)
    monkeypatch.setattr(attack, "BATCHES", 1)
    with pytest.raises(UserError, match="has another rho than the shadow before it"):
        attack.attack(*load_folder(runs / "victim/release"), [runs / "shadow", runs / "half"], runs / "cache")


def test_auc_is_the_chance_that_a_positive_is_above_a_negative():
    positive, negative = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])
    assert measure.auc(positive, negative) == pytest.approx((1 + 1.5 + 2) / 6)


def test_figure_6_counts_zeros_and_what_the_largest_gradients_find():
    g, masks = {"w": torch.tensor([0.0, -0.3, 0.1, 0.0, 0.0, 0.2])}, {"w": torch.tensor([1, 1, 1, 0, 0, 0]).bool()}
    found = measure.figure_6(g, masks)
    assert found["zeros"] == pytest.approx({"ticket": 1 / 3, "complement": 2 / 3})
    assert found["found"] == pytest.approx(2 / 3)  # of 0.3, 0.2 and 0.1
    assert found["auc of the rest"] == 0.5
    assert sum(found["ticket"]) == 2


def test_measuring_leaves_the_weights_and_the_parts_of_a_step_add_up(runs):
    found = measure.measure_run(runs / "dense", runs / "victim", runs / "cache", str(runs / "text.jsonl"))
    step = found["proposition 1"]["curvature"]
    assert step["cross"] == pytest.approx(step["full"] - step["ticket"] - step["complement"])
    middle = found["alphas"].index(0.0)
    assert len({curve[middle] for curve in found["figure 5"].values()}) == 1  # the three lines cross at theta
    assert len({curve[0] for curve in found["figure 5"].values()}) == 3
    parts = measure.parts({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([True, False])})
    assert [part["w"].tolist() for part in parts.values()] == [[1, 2], [1, 0], [0, 2]]
    assert 0.5 < found["premise"] < 1.1
    model = build(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=2))
    initialise(model, b"1")
    before = {name: p.clone() for name, p in model.named_parameters()}
    measure.loss_beside(model, torch.randint(50, (2, 8)), before, (0.5, -0.5))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def lines_of_a_study():
    """Lines with known effects. At its best rate (4 for the outsider, 8 for the others) an arm has 4.5 nats and:"""
    worse = {"outsider": 0.2, "random": 0.1, "authorised": 0.05, "matched": 0.02}
    text_loss = {"pmp": 5.03, "matched": 5.05}
    lines, rng = [], np.random.default_rng(0)

    def train(model, length, pair):
        loss = text_loss.get(model, 5.0) + 0.001 * rng.normal()
        lines.append({"key": study.trained(model, pair, length), "task": {"loss": 6.0}, "text": {"loss": loss}})

    def tune(arm, length, pair):
        growth = 0.1 * math.log10(length) if arm == "outsider" else 0
        for key in study.tunings(arm, pair, length):
            best = 4 if arm == "outsider" else 8
            loss = 4.5 + worse.get(arm, 0) + growth + 0.1 * math.log2(key["rate"] / best) ** 2
            rise = 0.25 * key["rate"] * (1.1 if arm == "outsider" else 1)
            lines.append({"key": key, "task": {"loss": loss + 0.001 * rng.normal(), "accuracy": 20.0},
                          "text": {"loss": 5.0 + rise}})

    for pair in range(8):
        for model in ("pmp", "dense", "random", "matched"):
            train(model, 1, pair)
        for arm in report.ARMS:
            tune(arm, 1, pair)
        found = {"found": 0.9 + 0.01 * rng.normal(), "surest": 1.0, "iou": 0.8, "auc": 0.95}
        lines.append({"key": {"do": "attack", "model": "pmp", "pair": pair},
                      **dict.fromkeys(("gradient", "distance", "shadow", "classifier"), found)})
    for length in (3, 10):
        for pair in range(4):
            train("pmp", length, pair)
            train("dense", length, pair)
            tune("outsider", length, pair)
            tune("dense", length, pair)
    return lines


def test_the_verdicts_are_those_of_the_effects_that_were_put_in():
    found = report.Study(lines_of_a_study())
    assert found.best_rate("outsider", 0) == 4
    assert found.best_rate("dense", 0) == 8
    asked = report.judge(report.questions(found))
    effects = [np.mean(ask["values"]) for ask in asked]
    assert effects[0] == pytest.approx(0.03, abs=0.002)
    assert effects[1] == pytest.approx(0.2, abs=0.002)
    assert effects[3] == pytest.approx(0.1, abs=0.002)
    assert effects[4] == pytest.approx(0.15, abs=0.002)
    assert effects[5] == pytest.approx(math.log((1.1 - 0.03) / 1), abs=0.01)
    assert effects[6] == pytest.approx(0.9, abs=0.01)
    assert effects[7] == pytest.approx(0.1, abs=0.01)
    assert [ask["verdict"] for ask in asked] == [
        "holds", "holds", "does not hold", "holds", "holds", "holds", "does not hold", "holds"]
    text = report.describe(found)
    assert "on the line of `matched`: +0.18" in text  # 0.2, of which 0.02 * 0.03 / 0.05 is lost capability


@pytest.mark.parametrize("effect, verdict", [(0.04, "holds"), (0.06, "does not hold"), (0.0501, "open")])
def test_an_effect_is_judged_by_its_distance_from_the_bound(effect, verdict):
    values = [effect + 0.001 * i for i in (-3, -2, -1, 0, 0, 1, 2, 3)]
    ask = {"values": values, "bound": 0.05, "above": False}
    empty = {"values": [], "bound": 0, "above": True}
    assert [asked["verdict"] for asked in report.judge([ask, empty])] == [verdict, "not run"]


def test_a_pair_does_not_choose_its_own_rate():
    lines = lines_of_a_study()
    for line in lines:
        if line["key"].get("arm") == "dense" and line["key"]["pair"] == 0 and line["key"]["rate"] == 1:
            line["task"]["loss"] = -5.0
    found = report.Study(lines)
    assert found.best_rate("dense", 0) == 8
    assert found.best_rate("dense", 1) == 1


def test_equal_forgetting_is_on_the_line_between_the_two_nearest_rates():
    found = report.Study(lines_of_a_study())
    low, high = (found.rise("outsider", 0, rate) for rate in (1, 2))
    share = (0.5 - low) / (high - low)
    expected = found.tuned("outsider", 0, 1) * (1 - share) + found.tuned("outsider", 0, 2) * share
    assert found.at_equal_forgetting("outsider", 0) == pytest.approx(expected)


def test_table_1_has_the_mean_of_the_pairs_and_leaves_out_what_is_missing():
    lines = []
    for weights, accuracy in (("a", 60.0), ("b", 64.0)):
        lines.append({"method": "full", "weights": weights, "authorised": False, "commonest": {"RTE": 52.7},
                      "epochs": [{"RTE": {"accuracy": accuracy}}]})
    lines.append({**lines[0], "weights": "of another study"})
    lines.append({**lines[0], "authorised": True})
    text = report.table_1(lines, {"a": "pmp", "b": "pmp"})
    assert "| full, PMP | 62.0 ±2.8 | 62.0 | 46.57 |" in text
    assert "| full, PMP + mask | – | – | – |" in text


def test_a_torn_line_is_no_result_and_the_last_of_a_key_counts(tmp_path):
    file = tmp_path / "study.jsonl"
    file.write_text('{"key": {"a": 1}, "x": 1}\n{"key": {"a": 1}, "x": 2}\n{"key": {"a": 2}, "x')
    assert study.read_results(file) == {'{"a": 1}': {"key": {"a": 1}, "x": 2}}


def test_holm_is_the_corrected_p_of_each():
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert report.holm([0.02, 1.0]) == [0.04, 1.0]


def test_the_jobs_are_all_different_and_each_waits_for_its_models():
    jobs = list(study.jobs())
    keys = [json.dumps(job) for job in jobs]
    assert len(set(keys)) == len(keys)
    done = set()
    while len(done) < len(keys):
        before = len(done)
        for job, key in zip(jobs, keys):
            if all(json.dumps(need) in done for need in study.needs(job)):
                done.add(key)
        assert len(done) > before  # nothing waits for ever
    for i, job in enumerate(jobs):  # one pass finds what cannot be done after a failure
        assert all(keys.index(json.dumps(need)) < i for need in study.needs(job)), job
    assert study.needs({"do": "attack", "model": "pmp", "pair": 7})[1] == study.trained("pmp", 0)


def test_a_block_of_the_report_is_replaced_and_the_rest_stays():
    text = "a\n<!-- t -->\n\nold\n\n<!-- end of t -->\nb"
    new = report.replace_block(text, "t", "new\nnew")
    assert new == "a\n<!-- t -->\n\nnew\nnew\n\n<!-- end of t -->\nb"
    assert report.replace_block(new, "t", "old") == text
    with pytest.raises(UserError, match="no place for u"):
        report.replace_block(text, "u", "new")


def test_the_document_has_the_tables_of_its_lines(tmp_path, monkeypatch):
    shutil.copytree(report.HERE / "results" / "study", tmp_path / "study")
    shutil.copy(report.HERE / "README.md", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(tmp_path / "study"), "--readme",
                                      str(tmp_path / "README.md")])
    report.main()
    assert (tmp_path / "README.md").read_text() == (report.HERE / "README.md").read_text()
