"""What pmp.py promises, each test named after the property that it proves. Needs no network and no data but its own."""

import io
import json
import math
import multiprocessing
import os
import pkgutil
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # small tensors gain nothing from a second thread; read when torch starts

import pytest
import torch
import torch.distributed as dist

import pmp
from common import Stopped, UserError, command_line, fingerprint, load_safetensors, lock, stop_signals, whole
from data import text as text_module, tokenizer as tokenizer_module
from model import LlamaConfig, build, initial_value, initialise, load_folder

SHAPE = LlamaConfig(vocab_size=4096, max_position_embeddings=64, hidden_size=16, intermediate_size=24,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
pmp.PRESETS["small"] = (SHAPE, "bpe", {})  # a whole run takes a tenth of a second

# ---- helpers -------------------------------------------------------------------------------------------------------


def write_text(file, seed=0):
    """A .jsonl file of 300 documents, in which a subject decides what follows: there is something to learn."""
    draw = random.Random(seed)
    ends = {"the cat": "drinks milk", "a dog": "chases the ball", "my mask": "stays private", "one ticket": "wins"}
    documents = []
    for _ in range(300):
        subjects = draw.choices(list(ends), k=draw.randint(4, 12))
        sentences = [f"{subject} {ends[subject]} in {draw.choice(['May', 'June', 'July'])}." for subject in subjects]
        documents.append(json.dumps({"text": " ".join(sentences)}))
    file.write_text("\n".join(documents))
    return file


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    """Flags of a tiny run: 3 steps of stage I and 6 updates, with decay, accumulation and clipping."""
    folder = tmp_path_factory.mktemp("text")
    data = write_text(folder / "corpus_of_mine.jsonl")
    return (f"--preset small --data {data} --cache {folder / 'cache'} --block-size 16 --batch-size 2 --grad-accum 2 "
            "--eb-steps 3 --steps 6 --warmup 2 --lr 0.01 --val-every 3 --val-blocks 8 --save-every 2 --init-seed 3 "
            "--device cpu --dtype fp32 --compile off").split()


@pytest.fixture(scope="session")
def finished(flags, tmp_path_factory):
    """The folder of one whole run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(flags, out=out)
    return out


def arguments(flags, **more):
    """The flags, and behind them those that are given as keywords, which win. True is a flag without a value."""
    argv = [str(flag) for flag in flags]
    for name, value in more.items():
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv.append(str(value))
    return argv


def run(flags, **more):
    pmp.main(arguments(flags, **more))


def value_of(flag, flags):
    return flags[flags.index(flag) + 1]


def weights(out):
    return load_safetensors(out / "release" / "model.safetensors")[0]


def ticket(out):
    return pmp.load_mask(out / "private" / "mask.safetensors", weights(out))


def theta_0(out):
    """theta(0) of a run, from its secret."""
    secret = bytes.fromhex(pmp.load_checkpoint(out)["secret"])
    model, _ = load_folder(out / "release")
    return {name: initial_value(model, name, p.shape, secret) for name, p in model.named_parameters()}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def differs(a, b):
    """Which entries of two sets of weights differ in any bit, as one flat mask."""
    return flat({name: a[name].detach().view(torch.int32) != b[name].detach().view(torch.int32) for name in a})


def log_of(out, stage=""):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if stage in ("", line["stage"])]


def same_run(out, other):
    """Two runs have the same release, the same mask and the same losses, to the last bit."""
    assert fingerprint(weights(out)) == fingerprint(weights(other))
    assert fingerprint(ticket(out)) == fingerprint(ticket(other))
    assert [line["loss"] for line in log_of(out)] == [line["loss"] for line in log_of(other)]
    assert not list(out.rglob("*.partial"))


def on_call(patch, target, number, action):
    """Let action() happen before the call of that number (from 1) of a function such as "os.fsync"."""
    real = pkgutil.resolve_name(target)
    calls = []

    def spy(*args, **kwargs):
        calls.append(target)
        if len(calls) == number:
            action()
        return real(*args, **kwargs)

    patch.setattr(target, spy)


def stopped(flags, out, **more):
    """A run that a signal ended after 3 updates of stage II."""
    with pytest.MonkeyPatch.context() as patch:
        on_call(patch, "pmp.learning_rate", 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            run(flags, out=out, **more)
    return out


FORKS = multiprocessing.get_context("forkserver")  # new processes whose imports are done, which saves two seconds each
FORKS.set_forkserver_preload([__name__, "torch._dynamo", "torch.distributed.fsdp"])


def enter(main, argv, said, environment, at):
    """What a new process does: main(argv) as the command line runs it. What it prints goes to the file `said`.

    at: (function, number, signal): the process gets the signal before that call of the function.
    """
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    if at:
        on_call(pytest.MonkeyPatch(), at[0], at[1], lambda: signal.raise_signal(at[2]))
    command_line(lambda: main(argv))


def start(argv, said, ranks=1, at=None, main=pmp.main):
    """The processes of main(argv), one for each rank, as torchrun starts them. The last one gets the signal of `at`."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = str(unused.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        last = rank == ranks - 1
        args = (main, argv, str(said), environment, at if last else None)
        processes.append(FORKS.Process(target=enter, args=args, daemon=True))
        processes[-1].start()
    return processes


def codes(processes):
    """The exit codes of processes, once they have ended."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


# ---- stage I -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda x: x, torch.round, torch.zeros_like, lambda x: x * 0 - 2.5, lambda x: x * 1e-40, lambda x: x.mT])
def test_topk_mask_is_the_exact_global_topk_with_ties_to_the_first(change):
    generator = torch.Generator().manual_seed(3)
    scores = {name: change(torch.randn(shape, generator=generator))
              for name, shape in {"a": (17, 5), "b": (60, 1), "c": (3, 4, 5)}.items()}
    d = len(flat(scores))
    order = flat(scores).abs().sort(descending=True, stable=True).indices
    for k in (1, 2, d // 3, int(0.7 * d), d - 1, d):
        masks = pmp.topk_mask(scores, k)
        expected = torch.zeros(d, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(flat(masks), expected)
        assert all(masks[name].shape == scores[name].shape for name in scores)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error(value):
    with pytest.raises(FloatingPointError):
        pmp.topk_mask({"a": torch.ones(3), "b": torch.tensor([1.0, value])}, 2)


def test_iou_is_the_intersection_over_the_union_of_all_tensors_together():
    a = {"x": torch.tensor([True, True, False, False]), "y": torch.tensor([True, False])}
    b = {"x": torch.tensor([True, False, True, False]), "y": torch.tensor([True, False])}
    assert pmp.iou(a, b) == 2 / 4
    assert pmp.iou(a, a) == 1


def test_a_random_mask_has_exactly_k_entries_and_depends_on_the_secret_alone():
    params = dict(build(SHAPE).named_parameters())
    mask, again, other = (pmp.random_mask(params, 5000, secret) for secret in (b"1", b"1", b"2"))
    assert flat(mask).sum() == 5000
    assert torch.equal(flat(mask), flat(again))
    rho = 5000 / len(flat(mask))
    assert pmp.iou(mask, other) == pytest.approx(rho / (2 - rho), abs=0.02)


@pytest.mark.parametrize("kept, last", [("0111", 5), ("01101110", 8), ("1101100", 8), ("111", 4)])
def test_stage_1_ends_after_successive_stable_steps_or_at_its_limit(kept, last, flags, tmp_path, monkeypatch, capsys):
    """kept: whether the mask stayed, from step 2 on. The patience is 3 steps, the limit 8."""
    overlaps = [0.95 if stays == "1" else 0.8 for stays in kept]
    monkeypatch.setattr(pmp, "iou", lambda a, b: overlaps.pop(0))
    run(flags, eb_iou=0.9, eb_patience=3, eb_steps=8, steps=2, out=tmp_path / "out")
    assert [line["step"] for line in log_of(tmp_path / "out", "stage I")] == list(range(1, last + 1))
    assert ("the mask is stable" in capsys.readouterr().out) == ("111" in kept)


@pytest.mark.parametrize("score, steps", [("batch", 3), ("mean", 50)])
def test_the_ticket_is_the_topk_of_the_last_score_and_a_mean_score_becomes_stable(
        score, steps, flags, tmp_path, monkeypatch, capsys):
    seen = []
    real = pmp.topk_mask

    def spy(scores, k):
        seen.append({name: tensor.clone() for name, tensor in scores.items()})
        return real(scores, k)

    monkeypatch.setattr(pmp, "topk_mask", spy)
    out = tmp_path / "out"
    run(flags, score=score, eb_steps=steps, eb_iou=0.8 if score == "mean" else 1, eb_patience=2, out=out)
    assert ("the mask is stable" in capsys.readouterr().out) == (score == "mean")
    lines = log_of(out, "stage I")
    assert len(lines) == len(seen) <= 10
    masks = ticket(out)
    last = real(seen[-1], math.floor(0.7 * len(flat(masks))))
    assert all(torch.equal(mask, masks[name]) for name, mask in last.items())
    norms = [float(flat(scores).norm()) for scores in seen]
    assert (norms == pytest.approx([line["norm"] for line in lines])) == (score == "batch")  # the gradient itself


# ---- stage II ------------------------------------------------------------------------------------------------------


def parameters():
    model = build(SHAPE)
    initialise(model, b"secret")
    return dict(model.named_parameters())


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator)


def test_the_complement_keeps_its_bits_and_the_whole_ticket_moves():
    params = parameters()
    masks = pmp.random_mask(params, 7000, b"m")
    optimizer = pmp.MaskedAdamW(params, masks, weight_decay=0.5)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step(0.01, clip=1.0)
    assert torch.equal(differs(params, parameters()), flat(masks))


@pytest.mark.parametrize("masked", [False, True])
def test_without_masks_or_with_full_ones_it_is_torchs_adamw_with_decay_on_matrices(masked):
    params, theirs = parameters(), parameters()
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()} if masked else None
    optimizer = pmp.MaskedAdamW(params, masks, weight_decay=0.1)
    groups = [{"params": [p], "weight_decay": 0.1 * (p.ndim >= 2)} for p in theirs.values()]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for step in range(4):
        give_gradients(params, step)
        give_gradients(theirs, step)
        norm = optimizer.step(0.01, clip=1.0)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)))
        assert norm > 1  # so that it was clipped
        reference.step()
    assert all(torch.allclose(p, theirs[name], atol=1e-6) for name, p in params.items())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinite_gradient_changes_nothing(value):
    params = parameters()
    optimizer = pmp.MaskedAdamW(params, None, weight_decay=0.1)
    give_gradients(params, 0)
    params["model.norm.weight"].grad[3] = value
    with pytest.raises(FloatingPointError, match="norm"):
        optimizer.step(0.01, clip=1.0)
    assert not differs(params, parameters()).any()
    assert not optimizer.state()


def test_an_optimizer_goes_on_from_its_state_with_the_same_bits():
    first, second = parameters(), parameters()
    masks = pmp.random_mask(first, 7000, b"m")
    optimizer = pmp.MaskedAdamW(first, masks, weight_decay=0.1)
    successor = pmp.MaskedAdamW(second, masks, weight_decay=0.1)
    for step in range(6):
        give_gradients(first, step)
        optimizer.step(0.01, clip=1.0)
        if step == 2:
            for name, p in second.items():
                p.data.copy_(first[name])
            successor.load_state(optimizer.state())
        elif step > 2:
            give_gradients(second, step)
            successor.step(0.01, clip=1.0)
    assert not differs(first, second).any()


def test_the_learning_rate_warms_up_and_decays_to_zero():
    args = SimpleNamespace(steps=100, warmup=10, lr=1.0)
    rates = [pmp.learning_rate(step, args) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[10], rates[100]) == (1, 0)
    assert rates[55] == pytest.approx(0.5)


def test_an_optimizer_that_moves_the_complement_is_told_and_nothing_is_released(flags, tmp_path, monkeypatch):
    real = pmp.MaskedAdamW
    monkeypatch.setattr(pmp, "MaskedAdamW", lambda params, masks, decay: real(params, None, decay))
    with pytest.raises(UserError, match="outside the ticket have left theta.* by update 1"):
        run(flags, out=tmp_path / "out")
    assert not (tmp_path / "out" / "release").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(flags, tmp_path):
    with pytest.raises(UserError, match="lower --lr"):
        run(flags, lr=100, weight_decay=1000, ticket="random", steps=50, save_every=1, out=tmp_path / "out")
    saved = pmp.load_checkpoint(tmp_path / "out")
    assert saved["step"] > 0
    assert flat(saved["weights"]).isfinite().all()
    assert not (tmp_path / "out" / "release").exists()


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_a_release_has_the_complement_of_theta_0_and_a_ticket_of_floor_rho_d_that_moved(finished):
    inside = flat(ticket(finished))
    assert inside.sum() == math.floor(0.7 * len(inside))
    moved = differs(weights(finished), theta_0(finished))
    assert not moved[~inside].any()
    assert moved[inside].float().mean() > 0.9
    first, second = log_of(finished, "stage I"), log_of(finished, "stage II")
    assert [line["step"] for line in first + second] == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in second if "val" in line] == [3, 6]
    assert all(0 < line["iou"] < 1 for line in first[1:])


def test_what_is_secret_is_for_the_owner_alone_whatever_the_umask(flags, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    try:
        run(flags, init_seed=271828, out="~/out")  # which no shell has expanded
    finally:
        os.umask(before)
    assert stat.S_IMODE((out / "private").stat().st_mode) == 0o700
    secret_files = {*(out / "private").iterdir(), out / "settings.json", out / "log.jsonl"}
    assert {path.name for path in secret_files} >= {"checkpoint.pt", "mask.safetensors", "lock"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret_files} == {0o600}
    settings = (out / "settings.json").read_text()
    assert json.loads(settings)["rho"] == 0.7
    secret = pmp.load_checkpoint(out)["secret"]
    assert not any(word in settings for word in ("init_seed", "271828", secret))


def test_every_byte_beside_the_weights_is_the_same_with_and_without_pmp_and_names_no_text(flags, finished, tmp_path):
    run(flags, rho=1.0, out=tmp_path / "out")
    assert not (tmp_path / "out" / "private" / "mask.safetensors").exists()
    names = {path.name for path in (finished / "release").iterdir()}
    assert names == {path.name for path in (tmp_path / "out" / "release").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"}
    for name in names:
        ours, theirs = ((out / "release" / name).read_bytes() for out in (finished, tmp_path / "out"))
        assert b"corpus_of_mine" not in ours, name
        if name == "model.safetensors":  # of this the header alone, which has a sha256 of the published weights
            size = 8 + int.from_bytes(ours[:8], "little")
            ours, theirs = (json.loads(content[8:size]) for content in (ours, theirs))
            assert ours.pop("__metadata__").keys() == theirs.pop("__metadata__").keys() == {"format", "sha256"}
        assert ours == theirs, name


GOLDEN = [  # 3 steps of stage I, 24 updates of stage II
    5.799, 5.714, 5.583, 5.799, 5.691, 5.489, 5.300, 5.098, 4.942, 4.747, 4.538, 4.384, 4.167, 4.001, 3.874, 3.705,
    3.594, 3.490, 3.375, 3.370, 3.311, 3.212, 3.209, 3.168, 3.200, 3.119, 3.150]


def test_the_loss_curve_is_the_one_on_record(flags, tmp_path):
    """Another order of summation moves a few bits of the mask at the threshold, and then the curve a little."""
    run(flags, steps=24, out=tmp_path / "out")
    assert [line["loss"] for line in log_of(tmp_path / "out")] == pytest.approx(GOLDEN, abs=0.02)


def test_the_mask_takes_one_bit_a_parameter_and_belongs_to_one_release(finished, tmp_path):
    file = finished / "private" / "mask.safetensors"
    params = weights(finished)
    masks = pmp.load_mask(file, params)
    d = len(flat(masks))
    assert d / 8 < file.stat().st_size < d / 8 + 3000
    assert fingerprint(pmp.unpack_mask(pmp.pack_mask(masks), params)) == fingerprint(masks)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        pmp.load_mask(tmp_path / "flipped", params)
    params["model.norm.weight"] = params["model.norm.weight"] + 1e-6
    with pytest.raises(UserError, match="another release"):
        pmp.load_mask(file, params)


# ---- an end before the end -----------------------------------------------------------------------------------------


def test_a_run_killed_at_its_first_write_then_at_its_second_and_so_on_ends_with_the_same_bits(flags, tmp_path):
    more = {"steps": 15, "save_every": 1}
    run(flags, **more, out=tmp_path / "whole")
    argv = arguments(flags, **more, resume=True, out=tmp_path / "out")
    for number in range(1, 40):
        function = "os.fsync" if number % 3 else "os.replace"
        code = codes(start(argv, tmp_path / "said", at=(function, number, signal.SIGKILL)))
        if code == [0]:
            break
        assert code == [-signal.SIGKILL], (tmp_path / "said").read_text()
    assert 10 < number < 39
    same_run(tmp_path / "out", tmp_path / "whole")


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(flags, tmp_path):
    more = {"steps": 60, "eb_steps": 20, "save_every": 5, "score": "mean"}
    run(flags, **more, out=tmp_path / "whole")
    argv = arguments(flags, **more, resume=True, out=tmp_path / "out")
    draw = random.Random()
    for _ in range(4):
        process, = start(argv, tmp_path / "said")
        process.join(draw.uniform(0.1, 0.6))
        process.kill()
        assert codes([process])[0] in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
    pmp.main(argv)
    same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("stage, function, call", [("I", "pmp.iou", 2), ("II", "pmp.learning_rate", 3)])
def test_a_signal_saves_the_finished_updates_and_resume_goes_on_after_them(
        stage, function, call, number, flags, tmp_path, monkeypatch, capsys):
    """Both calls are in step 3: the first step of stage I has no IoU."""
    more = {"score": "mean", "eb_steps": 5, "save_every": 100}
    run(flags, **more, out=tmp_path / "whole")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        on_call(patch, function, call, lambda: signal.raise_signal(number))
        with pytest.raises(Stopped) as leaving:
            run(flags, **more, out=tmp_path / "out")
    assert leaving.value.code == 128 + number
    assert signal.getsignal(number) == handler
    assert f"saved after update 3 of stage {stage};" in capsys.readouterr().out
    run(flags, **more, resume=True, out=tmp_path / "out")
    assert f"going on after update 3 of stage {stage}\n" in capsys.readouterr().out
    same_run(tmp_path / "out", tmp_path / "whole")


def test_a_signal_while_training_waits_for_text_saves_and_leaves_at_once(flags, tmp_path, monkeypatch):
    never = threading.Event()
    real = text_module.Tokens._append_window
    out = tmp_path / "out"

    def second_window_never_comes(tokens):
        if not tokens.state["windows"]:
            return real(tokens)
        while not (out / "log.jsonl").exists():
            never.wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        never.wait(60)
        raise InterruptedError  # ends the thread that packs

    monkeypatch.setattr(text_module.Tokens, "_append_window", second_window_never_comes)
    with pytest.raises(Stopped):
        run(flags, steps=10_000, eb_steps=1, shuffle_buffer=20, cache=tmp_path / "cache", out=out)
    assert pmp.load_checkpoint(out)["step"] > 0
    never.set()


def test_an_ignored_signal_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asked = []
        with stop_signals(asked):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_bad_line_deep_in_the_text_keeps_the_finished_updates(flags, tmp_path, monkeypatch, capsys):
    data = write_text(tmp_path / "long.jsonl")
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:200], '{"text": null}', *lines[200:]]))
    for module in (text_module, tokenizer_module):
        monkeypatch.setattr(module, "TRAINING_CHARACTERS", 10_000)  # what is read before the run begins
    monkeypatch.setattr(text_module, "HELD_OUT_TOKENS", 50)
    more = {"data": data, "shuffle_buffer": 20, "cache": tmp_path / "cache", "steps": 1000, "save_every": 1000}
    with pytest.raises(UserError, match='line 201 has no string "text"'):
        run(flags, **more, out=tmp_path / "out")
    saved = pmp.load_checkpoint(tmp_path / "out")
    assert saved["step"] > 5
    assert f"saved after update {saved['step']} of stage II" in capsys.readouterr().out


def test_resume_takes_machine_flags_anew_from_any_folder_and_refuses_another_value_of_the_rest_by_name(
        flags, finished, tmp_path, monkeypatch, capsys):
    data = Path(value_of("--data", flags))
    monkeypatch.chdir(data.parent)
    out = tmp_path / "out"
    stopped(flags, out, resume=True, data=data.name)  # where there is nothing yet, a run begins
    for name, value in (("rho", 0.6), ("steps", 7), ("lr", 0.02), ("seed", 1), ("init_seed", 4), ("dtype", "bf16")):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value} is not what the run in OUT has"):
            run([], **{name: value}, resume=True, out=out)
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        run(flags, out=out)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    run([], resume=True, cache="another", device="cpu", shard=True, save_every=1, out="out")  # a share of one is all
    assert "going on after update 3" in capsys.readouterr().out
    assert list((tmp_path / "another").iterdir())
    same_run(out, finished)


def test_resume_takes_the_same_command_and_refuses_a_text_or_an_optimizer_that_has_changed(flags, tmp_path):
    data = write_text(tmp_path / "own.jsonl")
    more = {"data": data, "cache": tmp_path / "cache", "dtype": "auto"}
    out = stopped(flags, tmp_path / "out", **more)
    write_text(data, seed=1)
    with pytest.raises(UserError, match="not the one that the run began with"):
        run(flags, **more, resume=True, out=out)
    write_text(data)
    run(flags, **more, resume=True, out=out)
    assert weights(out)
    file = out / "private" / "checkpoint.pt"
    torch.save({**torch.load(file), "optimizer": "Muon"}, file)
    with pytest.raises(UserError, match="trained with Muon"):
        run(flags, **more, resume=True, out=out)


def test_a_checkpoint_with_a_flipped_bit_or_without_its_end_is_refused(flags, tmp_path):
    out = stopped(flags, tmp_path / "out")
    file = out / "private" / "checkpoint.pt"
    content = file.read_bytes()
    saved = pmp.load_checkpoint(out)
    inside = content.index(saved["weights"]["lm_head.weight"].numpy().tobytes())
    contents = content.index(b"PK\x06\x06") + 48  # says where the archive's table of contents begins
    damaged = [b"", content[:1000], content[:-1]]
    for place in (inside, content.index(saved["secret"].encode()), contents):
        damaged.append(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
    for version in damaged:
        file.write_bytes(version)
        with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
            run(flags, resume=True, out=out)


# ---- a disk, a pipe, a terminal ------------------------------------------------------------------------------------


def limit_files(size=resource.RLIM_INFINITY):
    """What may be written into a file from now on, in bytes; more is an OSError, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_at_a_line_of_the_log_does_not_end_a_run(flags, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    on_call(monkeypatch, "pmp.learning_rate", 2, lambda: limit_files(300))
    on_call(monkeypatch, "pmp.learning_rate", 4, limit_files)
    try:
        run(flags, save_every=6, out=out)
    finally:
        limit_files()
    assert not differs(weights(out), weights(finished)).any()
    assert [line["step"] for line in log_of(out, "stage II")] == [1, 4, 5, 6]


@pytest.mark.parametrize("function, call, size, kept", [
    ("pmp.load_checkpoint", 1, 50_000, None), ("pmp.learning_rate", 4, 50_000, 2),
    ("pmp.learning_rate", 4, 100_000, 2)])
def test_a_full_disk_at_a_checkpoint_is_one_sentence_and_keeps_the_old_one(
        function, call, size, kept, flags, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        on_call(patch, function, call, lambda: limit_files(size))
        try:
            with pytest.raises(SystemExit) as leaving:
                command_line(lambda: run(flags, out=out))
        finally:
            limit_files()
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no space left to write")
    assert error.count("\n") == 1
    saved = pmp.load_checkpoint(out)
    assert (saved and saved["step"]) == kept
    assert not list(out.rglob("*.partial"))
    run(flags, resume=True, out=out)
    same_run(out, finished)


def test_a_reader_that_has_gone_does_not_end_a_run(flags, tmp_path):
    """The command as it is typed, with a preset that it has."""
    argv = arguments(flags[2:], preset="mini", eb_steps=1, steps=2, out=tmp_path / "out")
    shell = '"$@" | head -n 1; exit ${PIPESTATUS[0]}'
    result = subprocess.run(["bash", "-c", shell, "bash", sys.executable, pmp.__file__, *argv], capture_output=True,
                            text=True, timeout=60)
    assert (result.returncode, result.stderr, result.stdout.count("\n")) == (0, "", 1)
    assert weights(tmp_path / "out")


def test_a_terminal_that_knows_ascii_alone_is_enough_and_no_core_is_dumped(flags, tmp_path, monkeypatch):
    screen = io.BytesIO()
    limits = []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    command_line(lambda: run(flags, out=tmp_path / "möglich"))
    assert b"m?glich" in screen.getvalue()
    assert limits == [(resource.RLIMIT_CORE, (0, 0))]


def test_help_fits_a_screen_and_names_ranges(capsys):
    with pytest.raises(SystemExit) as leaving:
        pmp.main(["-h"])
    assert not leaving.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 80
    for name, allowed in (("--rho", "0..1"), ("--block-size", "2.."), ("--eb-iou", "0..1")):
        assert any(name in line and allowed in line for line in lines), name
    assert max(lines, key=len)[100:] == ""


# ---- what is refused -----------------------------------------------------------------------------------------------


def refused(argv, expect, folder):
    """main(argv) complains with the expected words, and changes nothing below the folder."""
    def listing():
        return {path: path.read_bytes() if path.is_file() else path.is_symlink() for path in folder.rglob("*")}

    before = listing()
    with pytest.raises((UserError, OSError), match=expect):
        pmp.main(argv)
    assert listing() == before


@pytest.mark.parametrize("typed, expect", [
    ("--rho 0", "--rho.*'0' is no number"), ("--rho nan", "--rho"), ("--rho 1.1", "--rho"), ("--rho 1e-9", "--rho"),
    ("--preset huge", "--preset.*huge"), ("--roh 0.7", "--roh"), ("--ste 3", "--ste"), ("--steps 0", "--steps"),
    ("--steps 1.5", "--steps.*whole"), ("--warmup 9", "--warmup 9 is longer"), ("--lr inf", "--lr"),
    ("--mask mask.safetensors", "--init alone"), ("--also prose", "--init alone"),
    ("--twin nothing", "nothing holds no run"), ("--block-size 128", "64 positions"),
    ("--block-size 1000", "held-out tokens"), ("--batch-size 100000", "too few"), ("--device meta", "--device meta"),
    ("--device nonsense", "nonsense"), ("--data missing.jsonl", "missing.jsonl"), ("--data folder", "is empty"),
    ("--data empty.jsonl", "holds no text"), ("--data table.csv", "convert"), ("--out a\0b", "no name"),
    ("--out \udcff", "UTF-8"), ("--out=", "no name"), ("--out empty.jsonl", "cannot|folder|Not a directory"),
    ("--out .", "is not empty, it holds"), ("--out linked", "not a link"), ("--out filed", "must be a folder"),
    ("--out busy", "another process is using"),
])
def test_a_bad_flag_is_named_and_leaves_nothing(typed, expect, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "linked", "filed", "busy/private"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("empty.jsonl", "table.csv", "filed/private"):
        (tmp_path / name).touch()
    (tmp_path / "linked" / "private").symlink_to(tmp_path / "folder")
    with lock(tmp_path / "busy" / "private" / "lock"):
        refused([*flags, "--out", "out", *typed.split(" ")], expect, tmp_path)


@pytest.mark.parametrize("typed, expect", [
    ("--init release --data prose --rho 0.5", "--rho has no meaning"), ("--init release", "--init needs --data"),
    ("--init gpt2 --data prose", "no folder .*gpt2")])
def test_what_does_not_go_with_init_is_refused(typed, expect, tmp_path):
    refused([*typed.split(" "), "--out", str(tmp_path / "out")], expect, tmp_path)


def test_the_private_folder_of_another_user_is_refused(flags, tmp_path, monkeypatch):
    (tmp_path / "out" / "private").mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    refused([*flags, "--out", str(tmp_path / "out")], "another user", tmp_path)


def test_ranks_that_cannot_share_the_sequences_or_were_not_started_by_torchrun_are_refused(
        flags, tmp_path, monkeypatch):
    argv = arguments(flags, batch_size=1, grad_accum=3, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(pmp, "world", lambda: 2)
        refused(argv, "3 sequences an update cannot be shared equally by 2 ranks", tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(argv, "start with torchrun", tmp_path)


def test_a_complaint_is_one_line_without_traceback_and_code_2(tmp_path):
    result = subprocess.run([sys.executable, pmp.__file__, "--rho", "0", "--out", str(tmp_path / "out")],
                            capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: argument --rho: '0' is no number")
    assert not (tmp_path / "out").exists()


# ---- more than one process -----------------------------------------------------------------------------------------


def test_two_ranks_are_one_run_with_the_same_bits(flags, finished, tmp_path):
    """Each adds the two gradients that one process adds, so that not even the rounding differs."""
    said = tmp_path / "said"
    assert codes(start(arguments(flags, out=tmp_path / "out"), said, ranks=2)) == [0, 0], said.read_text()
    assert said.read_text().count("\nreleased") == 1
    same_run(tmp_path / "out", finished)


def test_a_sharded_run_that_was_stopped_goes_on_sharded_or_in_one_process_and_keeps_the_complement(
        flags, finished, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    argv = arguments(flags, shard=True, resume=True, out=out)
    ended = codes(start(argv, said, ranks=2, at=("pmp.learning_rate", 3, signal.SIGTERM)))
    assert ended[1] == 128 + signal.SIGTERM, said.read_text()
    assert "saved after update 3 of stage II" in said.read_text()
    shutil.copytree(out, tmp_path / "one")
    assert codes(start(argv, said, ranks=2)) == [0, 0], said.read_text()
    run(flags, resume=True, out=tmp_path / "one")
    for folder in (out, tmp_path / "one"):
        masks = ticket(folder)
        assert not differs(weights(folder), theta_0(folder))[~flat(masks)].any()
        assert pmp.iou(masks, ticket(finished)) > 0.99  # another order of sums may move an entry at the threshold
        assert flat(weights(folder)).allclose(flat(weights(finished)), atol=5e-3)


def sharded_topk(argv):
    """What each of two ranks does: the masks of sharded scores against those of whole ones."""
    from torch.distributed.tensor import Shard, distribute_tensor
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    draw = {name: torch.randn(shape, generator=generator)
            for name, shape in {"a": (3, 50), "b": (1001,), "c": (50, 20), "d": (1, 9)}.items()}
    for scores in (draw, {name: score.round() for name, score in draw.items()}):  # the latter: with ties
        split = {name: distribute_tensor(score, mesh, [Shard(0)]) for name, score in scores.items()}
        for k in (1, 100, 2000):
            masks = pmp.topk_mask(split, k)
            assert torch.equal(flat({name: whole(mask) for name, mask in masks.items()}),
                               flat(pmp.topk_mask(scores, k)))
            assert pmp.iou(masks, pmp.topk_mask(split, 1000)) == pytest.approx(min(k, 1000) / max(k, 1000))
    dist.barrier()
    os._exit(7)  # which no other end gives


def test_the_ticket_of_sharded_gradients_is_that_of_whole_ones(tmp_path):
    said = tmp_path / "said"
    assert codes(start([], said, ranks=2, main=sharded_topk)) == [7, 7], said.read_text()


# ---- runs that go on from another ----------------------------------------------------------------------------------


def test_a_twin_has_the_same_theta_0_and_text_and_its_own_rho(flags, tmp_path):
    place = flags.index("--init-seed")
    own_secret = flags[:place] + flags[place + 2:]
    first, twin, other = (tmp_path / name for name in ("first", "twin", "other"))
    run(own_secret, out=first)
    run(own_secret, out=other)
    run([], twin=first, rho=1.0, cache=value_of("--cache", flags), out=twin)
    assert fingerprint(theta_0(twin)) == fingerprint(theta_0(first)) != fingerprint(theta_0(other))
    settings = pmp.load_checkpoint(twin)["settings"]
    assert (settings["rho"], settings["lr"], settings["steps"]) == (1.0, 0.01, 6)
    losses = [[line["loss"] for line in log_of(out, "stage II")] for out in (first, twin)]
    assert losses[0][0] == losses[1][0]  # of theta(0) on the same first mini-batch
    assert losses[0][5] != losses[1][5]


@pytest.fixture
def tuning(flags, finished, tmp_path):
    """Flags that go on from the finished run on another text."""
    data = write_text(tmp_path / "new.jsonl", seed=9)
    return ["--init", finished / "release", "--data", data, "--cache", value_of("--cache", flags),
            *"--block-size 16 --steps 6 --warmup 2 --save-every 2 --compile off --dtype fp32 --device cpu".split()]


def test_with_its_mask_a_release_is_tuned_in_the_ticket_alone_and_without_it_everywhere(
        tuning, flags, finished, tmp_path, capsys):
    masked, free = tmp_path / "masked", tmp_path / "free"
    run(tuning, mask=finished / "private" / "mask.safetensors", also=value_of("--data", flags), out=masked)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out loss of ")]
    assert ["new.jsonl" in line for line in lines] == [True, False]
    assert ["corpus_of_mine.jsonl" in line for line in lines] == [False, True]
    assert all("before" in line and "after" in line for line in lines)
    inside = flat(ticket(finished))
    moved = differs(weights(masked), weights(finished))
    assert not moved[~inside].any()
    assert moved[inside].float().mean() > 0.5
    assert torch.equal(flat(ticket(masked)), inside)  # in the file that belongs to the new release
    run(tuning, out=free)
    moved = differs(weights(free), weights(finished))
    assert moved[~inside].float().mean() > 0.5
    assert not (free / "private" / "mask.safetensors").exists()
    mask = masked / "private" / "mask.safetensors"
    refused(arguments(tuning, mask=mask, out=tmp_path / "out"), "another release", tmp_path)


def test_a_tuning_that_was_stopped_goes_on_with_the_same_bits_from_another_folder(
        tuning, finished, tmp_path, monkeypatch):
    run(tuning, mask=finished / "private" / "mask.safetensors", out=tmp_path / "whole")
    monkeypatch.chdir(finished)
    out = stopped(tuning, tmp_path / "out", init="release", mask="private/mask.safetensors")
    monkeypatch.chdir(tmp_path)
    run([], resume=True, cache=tuning[5], out=out)
    same_run(out, tmp_path / "whole")
