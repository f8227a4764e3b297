"""What PMP promises, each test named after the property that it proves. Needs no network and no data but its own."""

import copy
import json
import math
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pmp
from data import UserError
from model import (GPT2, GPT2Config, LlamaConfig, NextTokenLoss, add_lora, build, config_from_dict, config_to_dict, fingerprint,
                   initial_value, initialise, load_folder, load_safetensors, merge_lora, save_folder, save_safetensors)

HERE = Path(__file__).parent
SMALL = {
    "gpt2": GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4),
    "gpt2-untied": GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4, n_inner=40,
                              tie_word_embeddings=False),
    "llama": LlamaConfig(vocab_size=97, max_position_embeddings=48, hidden_size=32, intermediate_size=48,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=5000.0,
                         rms_norm_eps=1e-4),
    "llama-tied": LlamaConfig(vocab_size=97, max_position_embeddings=48, hidden_size=32, intermediate_size=48,
                              num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                              tie_word_embeddings=True),
}


def small_model(kind="llama"):
    """A model whose every weight matters to its logits: norm gains and biases are away from 1 and 0."""
    model = build(SMALL[kind])
    initialise(model, b"test")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5).add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def tokens(rows=3, length=24, vocab=97):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(2))


# -----------------------------------------------------------------------------
# model.py


@pytest.mark.parametrize("kind", SMALL)
def test_a_folder_of_ours_gives_the_same_logits_in_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, idx = small_model(kind), tokens()
    save_folder(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (theirs(idx).logits - model(idx)).abs().max() < 1e-4
    assert abs(theirs(idx, labels=idx).loss - model(idx, idx)) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", SMALL)
def test_a_folder_of_transformers_gives_the_same_logits_here(kind, dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_folder(tmp_path / "ours", small_model(kind)) if (tmp_path / "ours").mkdir() is None else None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # several files with an index
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    idx = tokens()
    assert (again(idx).logits - load_folder(tmp_path / "theirs")(idx)).abs().max() < 1e-4


def test_weights_saved_from_a_bare_body_open_too(tmp_path):
    model = small_model("gpt2")
    save_folder(tmp_path, model)
    body = {name.removeprefix("transformer."): p for name, p in model.named_parameters()}
    body["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)  # a constant that old versions of transformers saved
    save_safetensors(tmp_path / "model.safetensors", body, {"format": "pt"})
    assert torch.equal(load_folder(tmp_path)(tokens()), model(tokens()))


@pytest.mark.parametrize("change, named", [
    ({"model_type": "mistral"}, "mistral"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size"),
])
def test_a_config_that_needs_what_we_lack_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        config_from_dict({**config_to_dict(SMALL["llama"]), **change}, "config.json")


@pytest.mark.parametrize("kind", SMALL)
def test_config_survives_its_json(kind):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(SMALL[kind]))), "") == SMALL[kind]


def test_a_folder_with_a_missing_extra_or_misshapen_tensor_is_refused(tmp_path):
    model = small_model()
    tensors = dict(model.named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    for change, message in [({name: None}, f"lacks the tensor {name}"),
                            ({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}, "q_proj.bias"),
                            ({name: torch.ones(3, 3)}, r"\[3, 3\]")]:
        save_folder(tmp_path, model)
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_safetensors(tmp_path / "model.safetensors", changed, {})
        with pytest.raises(UserError, match=message):
            load_folder(tmp_path)


def test_safetensors_agrees_with_the_real_package(tmp_path):
    real = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(5, dtype=torch.uint8),
               "d": torch.tensor([True, False]), "e": torch.tensor(3.0), "f": torch.randn(2, 3).half(), "g": torch.zeros(0, 4)}
    save_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    real.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    for read in (real.load_file(tmp_path / "ours"), load_safetensors(tmp_path / "ours")[0],
                 load_safetensors(tmp_path / "theirs")[0]):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in read)


def test_a_safetensors_file_that_is_cut_or_changed_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"a": torch.randn(100), "b": torch.randn(9)}, {})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:200], whole[:5], b"", whole + b"x", b"\xff" * 300,
                    whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="x.safetensors"):
            load_safetensors(path)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_next_token_loss_is_cross_entropy(dtype, tolerance):
    logits = (torch.randn(300, 8000, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)  # more than one slice
    labels = torch.randint(8000, (300,))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().float().requires_grad_()
    loss, expected = NextTokenLoss.apply(ours * 1, labels), F.cross_entropy(theirs, labels)
    (2 * loss).backward(), (2 * expected).backward()
    assert abs(loss - expected) < 1e-5
    assert (ours.grad.float() - theirs.grad).abs().max() <= tolerance * theirs.grad.abs().max()


def test_the_loss_keeps_the_logits_once():
    model, idx = small_model(), tokens(4, 40)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(idx, idx)
    assert sizes.count(4 * 39 * 97) == 1


def test_checkpointing_changes_no_gradient():
    for kind in ("llama", "gpt2"):
        a, b = small_model(kind), small_model(kind)
        b.checkpointing = True
        for model in (a, b):
            model.train()
            model(tokens(), tokens()).backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters()))


def test_generate_is_seeded_and_leaves_the_global_generator_alone():
    model, state = small_model(), torch.get_rng_state()
    first = model.generate(tokens(1, 4), 60, seed=1)  # past the 48 positions
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (1, 64)
    assert torch.equal(first, model.generate(tokens(1, 4), 60, seed=1))
    assert not torch.equal(first, model.generate(tokens(1, 4), 60, seed=2))
    assert torch.equal(model.generate(tokens(1, 4), 5, top_k=1)[:, :5][:, -1], model(tokens(1, 4))[:, -1].argmax(-1))


def test_initial_weights_depend_on_the_secret_alone():
    torch.manual_seed(1)
    a, b, c = build(SMALL["llama"]), build(SMALL["llama"]), build(SMALL["llama"])
    initialise(a, b"one")
    torch.manual_seed(2)
    initialise(b, b"one")
    initialise(c, b"two")
    weights = [fingerprint(dict(model.named_parameters())) for model in (a, b, c)]
    assert weights[0] == weights[1] != weights[2]


def test_no_initial_weight_is_minus_zero():
    """Adding 0 to -0.0 changes its sign bit, so a frozen -0.0 would not stay as it was."""
    draws = initial_value(small_model(), "lm_head.weight", (2**13, 2**13), b"x").view(torch.int32)
    assert (draws == 0).any() and not (draws == -2**31).any()  # 2**26 draws: about four are 0.0, as many were -0.0


def test_initial_weights_follow_their_rules_and_no_parameter_is_forgotten():
    for kind, norms in (("gpt2", "ln_"), ("llama", "norm")):
        model = build(PRESET_LIKE[kind])
        initialise(model, b"x")
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                assert (p == 0).all()
            elif norms in name:
                assert (p == 1).all()
            else:
                residual = name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight"))
                assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 2) if residual else 0.02, rel=0.05), name
    with pytest.raises(KeyError, match="model.layers.0.new_thing"):
        initial_value(model, "model.layers.0.new_thing", (2, 2), b"x")


PRESET_LIKE = {"gpt2": GPT2Config(vocab_size=256, n_positions=64, n_embd=128, n_layer=2, n_head=2),
               "llama": LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
                                    num_attention_heads=2, num_key_value_heads=1)}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lora_starts_as_the_identity_and_merges_to_the_same_logits(kind):
    model, plain = small_model(kind), small_model(kind)
    layers = add_lora(model, rank=4)
    assert len(layers) == (2 if kind == "gpt2" else 4)
    assert torch.equal(model(tokens()), plain(tokens()))
    with torch.no_grad():
        for layer in layers:
            layer.B.normal_()
    adapted = model(tokens())
    assert (adapted - plain(tokens())).abs().max() > 0.1
    merge_lora(model)
    assert torch.equal(model(tokens()), adapted)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


# -----------------------------------------------------------------------------
# stage I


def exact_topk(scores, k):
    flat = torch.cat([score.abs().flatten() for score in scores.values()])
    order = torch.sort(flat, descending=True, stable=True).indices  # stable: ties in the order of their position
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:k]] = True
    return mask


@pytest.mark.parametrize("piece", [7, 2**20])
@pytest.mark.parametrize("kind", ["random", "constant", "tied", "zeros", "mostly zero", "tiny", "wide"])
def test_topk_mask_is_the_exact_global_topk(kind, piece, monkeypatch):
    monkeypatch.setattr(pmp, "PIECE", piece)
    generator = torch.Generator().manual_seed(3)
    draw = {name: torch.randn(shape, generator=generator) for name, shape in {"a": (17, 5), "b": (60,), "c": (3, 4, 5)}.items()}
    change = {"random": lambda x: x, "constant": lambda x: x * 0 - 2.5, "tied": lambda x: x.round(),
              "zeros": lambda x: x * 0, "mostly zero": lambda x: x * (x > 1), "tiny": lambda x: x * 1e-40,
              "wide": lambda x: x * 10 ** (8 * x)}[kind]
    scores = {name: change(x) for name, x in draw.items()}
    d = sum(x.numel() for x in scores.values())
    for k in (1, 2, d // 3, int(0.7 * d), d - 1, d):
        masks = pmp.topk_mask(scores, k)
        flat = torch.cat([mask.flatten() for mask in masks.values()])
        assert flat.sum() == k
        assert torch.equal(flat, exact_topk(scores, k))
        top = torch.cat([score.abs().flatten() for score in scores.values()])
        assert torch.equal(top[flat].sort().values, torch.topk(top, k).values.sort().values)


def test_iou_by_hand():
    a = {"x": torch.tensor([1, 1, 0, 0], dtype=torch.bool), "y": torch.tensor([1, 0], dtype=torch.bool)}
    b = {"x": torch.tensor([1, 0, 1, 0], dtype=torch.bool), "y": torch.tensor([1, 0], dtype=torch.bool)}
    assert pmp.iou(a, b) == 2 / 4
    assert pmp.iou(a, a) == 1


@pytest.mark.parametrize("stable, ends", [("0111", None), ("01111", 5), ("1111", 4), ("11101111", 8), ("0000", None)])
def test_early_bird_wants_successive_stable_steps(stable, ends):
    """A made-up sequence: at a 1 the mask stays, at a 0 it changes. Patience 4; the first candidate has no IoU."""
    bird = pmp.EarlyBird(0.99, 4)
    mask = {"x": torch.tensor([True, False, True, False])}
    assert bird.see(mask) is None
    for step, stays in enumerate(stable, 1):
        if stays == "0":
            mask = {"x": ~mask["x"]}
        assert bird.see(mask) == (1.0 if stays == "1" else 0.0)
        assert bird.stable == (step == ends)
        assert bird.mask is mask


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-tied"])
def test_density_by_kind_covers_every_parameter_once(kind):
    model = small_model(kind)
    params = dict(model.named_parameters())
    masks = pmp.random_mask(params, 5000, b"s")
    for name, mask in masks.items():
        if "v_proj" in name:
            mask.fill_(False)
        if "c_attn.weight" in name:
            mask[:, -32:] = False
        if "c_attn.bias" in name:
            mask[-32:] = False
    density = pmp.density_by_kind(masks)
    assert density["v"] == 0 and 0 < density["q"] < 1
    assert list(density) == ["embedding", "q", "k", "v", "o", "mlp", "norm"] + (["head"] if kind == "llama" else [])


def test_a_random_mask_is_exact_and_secret():
    params = dict(small_model().named_parameters())
    a, b, c = (pmp.random_mask(params, 12345, secret) for secret in (b"1", b"1", b"2"))
    assert sum(int(mask.sum()) for mask in a.values()) == 12345
    assert pmp.iou(a, b) == 1 and pmp.iou(a, c) < 0.8


# -----------------------------------------------------------------------------
# stage II


def random_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator)


def test_the_complement_keeps_its_bits_and_the_ticket_moves():
    params = dict(small_model("gpt2").named_parameters())
    before = copy.deepcopy(params)
    masks = pmp.random_mask(params, 7000, b"m")
    optimizer = pmp.MaskedAdamW(params, masks, weight_decay=0.5)
    for step in range(5):
        random_gradients(params, step)
        optimizer.step(lr=0.01, clip=1.0)
    for name, p in params.items():
        same = p.view(torch.int32) == before[name].view(torch.int32)
        assert same[~masks[name]].all() and not same[masks[name]].any(), name


def test_without_masks_it_is_torch_adamw():
    params = dict(small_model().named_parameters())
    reference = copy.deepcopy(params)
    optimizer = pmp.MaskedAdamW(params, None, weight_decay=0.1)
    matrices = [p for p in reference.values() if p.ndim >= 2]
    vectors = [p for p in reference.values() if p.ndim < 2]
    theirs = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                               lr=0.01, betas=(0.9, 0.95))
    for step in range(4):
        for group in (params, reference):
            random_gradients(group, step)
        norm = optimizer.step(0.01, clip=1.0)
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(reference.values(), 1.0).item())
        theirs.step()
    assert all(torch.allclose(p, reference[name], atol=1e-6) for name, p in params.items())


def test_the_norm_is_that_of_the_masked_gradient():
    params = {"w": torch.nn.Parameter(torch.zeros(4))}
    optimizer = pmp.MaskedAdamW(params, {"w": torch.tensor([True, False, True, False])}, 0.0)
    params["w"].grad = torch.tensor([3.0, 100.0, 4.0, -100.0])
    assert optimizer.step(0.1, clip=1.0) == 5.0


def test_an_infinite_gradient_changes_nothing():
    params = {"w": torch.nn.Parameter(torch.ones(2, 2))}
    optimizer = pmp.MaskedAdamW(params, None, 0.1)
    params["w"].grad = torch.tensor([[1.0, math.inf], [0, 0]])
    with pytest.raises(FloatingPointError):
        optimizer.step(0.1)
    assert (params["w"] == 1).all()


def test_learning_rate_warms_up_and_decays_to_zero():
    config = pmp.Config(steps=100, warmup=10, lr=1.0)
    rates = [pmp.learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[99] < 1e-3
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


# -----------------------------------------------------------------------------
# the command line, for real


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small .jsonl in which every sentence has a subject that decides its end, so that there is something to learn."""
    path = tmp_path_factory.mktemp("corpus") / "small.jsonl"
    words = random.Random(0)
    ends = {"The cat": "drinks milk", "A dog": "chases the ball", "My mask": "stays private", "One ticket": "wins early",
            "This model": "is released without it"}
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(400):
            text = " ".join(f"{subject} {words.choice(['often', 'never', 'always', 'now'])} {ends[subject]} in "
                            f"{words.choice('January February March April May June July'.split())} {words.randint(1, 99)}."
                            for subject in words.choices(list(ends), k=words.randint(2, 9)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def flags(corpus, cache):
    """Flags of a run that takes about a second: weight decay, accumulation, clipping and bf16 (where it is) are on."""
    return ["--data", str(corpus), "--cache", str(cache), "--block-size", "32", "--batch-size", "2", "--grad-accum", "2",
            "--steps", "6", "--warmup", "2", "--eb-steps", "3", "--val-every", "3", "--val-blocks", "8",
            "--save-every", "2", "--lr", "1e-3"]


@pytest.fixture(scope="session")
def finished(flags, tmp_path_factory):
    """The folder of one whole run, made by the command line as a user types it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    result = command(*flags, "--rho", "0.7", "--out", str(out))
    assert result.returncode == 0, result.stderr
    (out / "stdout").write_text(result.stdout)
    return out


def command(*flags, script="pmp.py", **kwargs):
    return subprocess.run([sys.executable, str(HERE / script), *map(str, flags)], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=300, **kwargs)


def weights(out):
    return load_safetensors(Path(out) / "release" / "model.safetensors")[0]


def secret_of(out):
    return bytes.fromhex(json.loads((out / "private" / "run.json").read_text())["init_secret"])


def test_a_real_run_leaves_the_complement_at_theta_0(finished):
    model = load_folder(finished / "release")
    params = dict(model.named_parameters())
    masks = pmp.load_mask(finished / "private" / "mask.safetensors", params)
    d = sum(p.numel() for p in params.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == math.floor(0.7 * d)
    moved = 0
    for name, p in params.items():
        same = p.view(torch.int32) == initial_value(model, name, p.shape, secret_of(finished)).view(torch.int32)
        assert same[~masks[name]].all(), name
        moved += int((~same).sum())
    assert moved > 0.6 * d
    assert pmp.complement_moved(model, masks, secret_of(finished)) == 0
    with torch.no_grad():
        params["model.embed_tokens.weight"][~masks["model.embed_tokens.weight"]] *= 1 + 1e-6
    assert pmp.complement_moved(model, masks, secret_of(finished)) > 0  # the check that guards the release can fail


def test_a_run_says_what_it_does(finished):
    text = (finished / "stdout").read_text()
    assert "the ticket is the LAST mask" in text and "iou chance 0.538" in text and "ticket density: embedding 0." in text
    assert "released" in text and "\r" not in text
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("I", i) for i in (1, 2, 3)] + [("II", i) for i in range(1, 7)]
    assert all("val_loss" in line for line in lines[5::3]) and all(0 < line["iou"] < 1 for line in lines[1:3])
    assert lines[3]["loss"] == pytest.approx(math.log(load_folder(finished / "release").config.vocab_size), rel=0.02)


def test_the_release_holds_weights_config_and_tokenizer_alone(finished, flags, tmp_path):
    release = finished / "release"
    assert {path.name for path in release.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json",
                                                         "tokenizer_config.json"}
    dense = tmp_path / "dense"
    pmp.main([*flags, "--rho", "1.0", "--out", str(dense)])
    assert not (dense / "private" / "mask.safetensors").exists()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # nothing but the weights differs by the mask
        assert (dense / "release" / name).read_bytes() == (release / name).read_bytes()
    headers = [(folder / "release" / "model.safetensors").read_bytes() for folder in (dense, finished)]
    header = [json.loads(h[8:8 + int.from_bytes(h[:8], "little")]) for h in headers]
    assert [h.pop("__metadata__").keys() for h in header] == [{"format", "crc32"}] * 2  # crc32 of the published weights
    assert header[0] == header[1]


def test_private_files_are_for_the_owner_alone(finished):
    private = finished / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert {path.name for path in private.iterdir()} == {"mask.safetensors", "checkpoint.safetensors", "run.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in private.iterdir()} == {0o600}


def test_the_mask_takes_one_bit_a_parameter_and_belongs_to_one_release(finished, tmp_path):
    mask, params = finished / "private" / "mask.safetensors", weights(finished)
    d = sum(p.numel() for p in params.values())
    assert d / 8 < mask.stat().st_size < d / 8 + 20_000
    masks = pmp.load_mask(mask, params)
    assert all(torch.equal(masks[name], pmp.unpack_mask(pmp.pack_mask(masks), params)[name]) for name in params)
    params["model.norm.weight"] = params["model.norm.weight"] + 1e-6
    with pytest.raises(UserError, match="another release"):
        pmp.load_mask(mask, params)
    damaged = tmp_path / "mask.safetensors"
    damaged.write_bytes(mask.read_bytes()[:-100] + b"\0" * 100)
    with pytest.raises(UserError, match="damaged"):
        pmp.load_mask(damaged, weights(finished))


def test_two_runs_draw_different_initial_weights_unless_told(finished, flags, tmp_path, capsys):
    for name in ("a", "b"):
        pmp.main([*flags, "--mask", "random", "--steps", "2", "--out", str(tmp_path / name), "--init-seed", "7"])
    assert "redraw the initial weights" in capsys.readouterr().out
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert fingerprint(a) == fingerprint(b)
    assert len(secret_of(finished)) == 32 and secret_of(finished) != secret_of(tmp_path / "a")


def test_mean_score_can_become_stable(flags, tmp_path, capsys):
    pmp.main([*flags, "--score", "mean", "--eb-steps", "30", "--eb-iou", "0.9", "--eb-patience", "2", "--steps", "2",
              "--out", str(tmp_path / "out")])
    assert "the mask is stable" in capsys.readouterr().out


def start_and_wait(flags, out, stage, step):
    """Start a run in `out` and return its process once it has logged that step."""
    process = subprocess.Popen([sys.executable, str(HERE / "pmp.py"), *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    mark, deadline = f'"stage": "{stage}", "step": {step},', time.time() + 120
    while not ((out / "log.jsonl").exists() and mark in (out / "log.jsonl").read_text()):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.005)
    return process


def test_kill_minus_9_and_resume_end_with_the_same_bits(flags, tmp_path):
    flags = [*flags, "--init-seed", "3", "--steps", "8"]
    pmp.main([*flags, "--out", str(tmp_path / "whole")])
    out = tmp_path / "killed"
    for stage, step in (("I", 2), ("II", 3), ("II", 7)):  # in the warm-up, between two checkpoints, near the end
        process = start_and_wait(flags + ["--out", str(out)] if stage == "I" else ["--resume", str(out)], out, stage, step)
        process.kill()
        process.communicate()
    result = command("--resume", out)
    assert result.returncode == 0 and "going on after update" in result.stdout
    assert fingerprint(weights(out)) == fingerprint(weights(tmp_path / "whole"))
    log = [(line["stage"], line["step"], line["loss"]) for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())]
    assert log == [(line["stage"], line["step"], line["loss"]) for line in
                   map(json.loads, (tmp_path / "whole" / "log.jsonl").read_text().splitlines())]


def test_ctrl_c_saves_and_says_how_to_resume(flags, tmp_path):
    out = tmp_path / "out"
    process = start_and_wait([*flags, "--steps", "400", "--save-every", "400", "--out", str(out)], out, "II", 3)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and f"--resume {out}" in text and "Traceback" not in text
    saved = int(load_safetensors(out / "private" / "checkpoint.safetensors")[1]["step"])
    assert f"saved after update {saved}" in text and saved >= 3


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(flags, tmp_path):
    out = tmp_path / "out"
    result = command(*flags, "--lr", "1e30", "--weight-decay", "0", "--mask", "random", "--save-every", "1", "--out", out)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "of stage II: the " in result.stderr and "lower --lr" in result.stderr
    tensors, state = load_safetensors(out / "private" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values()) and int(state["step"]) < 6
    assert not (out / "release").exists()


def test_compile_or_its_fallback_trains(flags, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler")
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    try:
        pmp.main([*flags, "--compile", "on", "--out", str(tmp_path / "out")])
    finally:
        torch.compiler.set_stance("default")
    assert "torch.compile does not work here" in capsys.readouterr().out
    assert weights(tmp_path / "out")


def bad(*flags, expect, capsys, code=2):
    with pytest.raises(SystemExit) as leave:
        pmp.command_line(lambda: pmp.main([str(flag) for flag in flags]))
    error = capsys.readouterr().err
    assert leave.value.code == code and expect in error and "Traceback" not in error, error


@pytest.mark.parametrize("change, expect", [
    (["--rho", "0"], "--rho 0.0 is outside"),
    (["--rho", "1.5"], "--rho 1.5 is outside"),
    (["--rho", "nan"], "--rho nan is outside"),
    (["--rho", "x"], "--rho"),
    (["--preset", "huge"], "huge"),
    (["--roh", "0.7"], "--roh"),
    (["--warmup", "9"], "longer than the run"),
    (["--steps", "0"], "--steps 0"),
    (["--lr", "-1"], "--lr"),
    (["--block-size", "4096"], "1024 positions"),
    (["--device", "warp"], "--device warp"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--batch-size", "100000"], "too small"),
    (["--resume", "nowhere"], "leave out --"),
])
def test_bad_flags_are_one_sentence_and_leave_no_trace(change, expect, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad(*flags, "--out", tmp_path / "out", *change, expect=expect, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_used_folder_is_refused_and_left_as_it_was(finished, flags, tmp_path, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    bad(*flags, "--out", finished, expect="--resume", capsys=capsys)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    (tmp_path / "notes.txt").write_text("mine")
    bad(*flags, "--out", tmp_path, expect="not empty", capsys=capsys)
    bad(*flags, "--out", tmp_path / "notes.txt", expect="is a file", capsys=capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_refuses_what_it_cannot_use(finished, tmp_path, capsys):
    bad("--resume", tmp_path, expect="no run to resume", capsys=capsys)
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    checkpoint = out / "private" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5000])
    bad("--resume", out, expect="checkpoint.safetensors", capsys=capsys)
    (out / "private" / "run.json").write_text("{")
    bad("--resume", out, expect="run.json is damaged", capsys=capsys)


def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(flags, tmp_path, capsys, monkeypatch):
    out, real, calls = tmp_path / "out", os.fsync, []

    def full(number):
        calls.append(number)
        if len([path for path in out.rglob("checkpoint.safetensors")]) and len(calls) > 6:
            raise OSError(28, "No space left on device")
        return real(number)
    monkeypatch.setattr(os, "fsync", full)
    bad(*flags, "--save-every", "1", "--out", out, expect="no space left to write", capsys=capsys)
    assert load_safetensors(out / "private" / "checkpoint.safetensors")[0]
    assert not list(out.rglob("*.partial"))
