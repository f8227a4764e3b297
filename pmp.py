"""Private Mask Pre-Training (PMP): open weights that outsiders gain little from fine-tuning.

    python pmp.py --rho 0.7

This file is section 2 of the paper (arXiv:2602.00446); equation numbers are the paper's. First come the presets and the
flags, then the parts that a fork changes: the top-k and the overlap of masks (stage I), the masked optimizer and the
learning rate (stage II), the files. `main` is the whole run, from the flags to the release.

A mask is a dict {parameter name: bool tensor}: True is the ticket, False the complement.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the slow imports without a word

import math
import os
import secrets
import time
import zipfile
from argparse import SUPPRESS, Namespace
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

# Without --shard whole(x) is x, and split_like(p, x) is x on p's device; in one process from_first(f) is f().
from common import (Parser, Progress, Stopped, UserError, any_rank, atomic, autocast, command_line, compile_model,
                    fingerprint, first_then_others, from_first, gather, join_ranks, leave_ranks, load_safetensors, lock,
                    mean_over_ranks, no_core_dumps, number, path, pick_device, pick_dtype, printable, rank,
                    save_safetensors, say, shard, sharded, split_like, stop_signals, whole, world, write_json)
from data.text import BUFFER, CACHE, prepare
from model import (CARD, GPT2Config, LlamaConfig, build, initial_value, load_folder, save_folder,
                   secret_generator)

# -----------------------------------------------------------------------------
# presets: a model's shape, the tokenizer of its text, and where its settings differ from the paper's

LAPTOP = {"data": "prose", "eb_steps": 50, "steps": 1000, "warmup": 60, "lr": 1.5e-3, "grad_accum": 1,
          "val_every": 200, "val_blocks": 64, "save_every": 200}
MINI = {"vocab_size": 4096, "max_position_embeddings": 1024, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
PRESETS = {
    "tiny": (LlamaConfig(  # a few minutes on a laptop
        vocab_size=4096, max_position_embeddings=1024, hidden_size=256, intermediate_size=704,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2), "bpe", LAPTOP),
    "mini": (LlamaConfig(**MINI, tie_word_embeddings=True), "bpe", LAPTOP),  # a third of tiny, for sweeps
    "mini-untied": (LlamaConfig(**MINI), "bpe", LAPTOP),
    "mini-gpt2": (GPT2Config(vocab_size=4096, n_positions=256, n_embd=192, n_layer=4, n_head=4), "bpe", LAPTOP),
    "gpt2": (GPT2Config(), "gpt2", {}),
    "tinyllama": (LlamaConfig(), "gpt2", {}),  # the paper's 1.1B shape (section 4.1), with GPT-2's vocabulary
}

# -----------------------------------------------------------------------------
# the flags. Defaults are those of section 4.1 and appendix A, where these give one; a preset may have its own

MAY_CHANGE = ("out", "cache", "device", "compile", "shard", "save_every", "resume")  # when a run is resumed
NOT_WITH_INIT = ("preset", "rho", "ticket", "score", "eb_steps", "eb_iou", "eb_patience", "init_seed", "twin")

EXAMPLES = """examples:
  python pmp.py --rho 0.7                                 a few minutes on a laptop
  python pmp.py --rho 1.0 --twin out --out out-dense      the same without PMP
  python pmp.py --data my.jsonl.xz --out out-mine         on your own text
  python pmp.py --out out-mine --resume                   after Ctrl-C or a power cut
  python pmp.py --init out/release --data my.txt --mask out/private/mask.safetensors --out out-tuned
"""


def parse(argv):
    """(what was typed, the defaults), both {name: value}."""
    parser = Parser("Pre-train with a private mask, and release the weights without it.", epilog=EXAMPLES,
                    usage="python pmp.py [flags]")
    defaults = {}

    def add(name, kind, default, help):
        """kind: a tuple of choices, bool, or what turns the typed text into a value."""
        defaults[name] = default
        if name in LAPTOP:
            help += f" [{LAPTOP[name]}; gpt2, tinyllama: {default}]"
        elif default not in (None, False, str(CACHE)):
            help += f" [{default}]"
        if kind is bool:
            form = {"action": "store_true"}
        elif isinstance(kind, tuple):
            form = {"choices": kind, "metavar": "NAME"}
            help = f"{', '.join(kind)}: {help}"
        else:
            form = {"type": kind, "metavar": getattr(kind, "range", "NAME" if kind is str else "PATH")}
        parser.add_argument("--" + name.replace("_", "-"), **form, default=SUPPRESS, help=help)

    many = number(int, 1, 10**9)
    add("rho", number(float, 1e-9, 1), 0.7, "share of all parameters in the ticket, 0 to 1; 1 is without PMP")
    add("preset", tuple(PRESETS), "tiny", "model and its defaults")
    add("data", path, "slimpajama", "prose, slimpajama, a .txt or .jsonl file (also .gz, .xz), or a folder of them")
    add("out", path, "out", "the run's folder: OUT/release is for publication, OUT/private stays with you")
    add("resume", bool, False, "go on if OUT holds a run, else begin")
    add("twin", path, None, "take theta(0), order of text and settings of the run in this folder")
    add("init", path, None, "go on from this release or Hugging Face folder: no stage I, 500 updates, --lr by width")
    add("mask", path, None, "with --init: the release's mask; the ticket alone moves")
    add("also", path, None, "with --init: another text; says how much of it is forgotten")
    add("ticket", ("earlybird", "random"), "earlybird", "how the ticket is found")
    add("score", ("batch", "mean"), "batch", "what EarlyBird ranks: |gradient| of a step (eq. 2), or its running mean")
    add("eb_steps", many, 500, "EarlyBird warm-up steps at most (t_EB)")
    add("eb_iou", number(float, 0, 1), 0.99, "IoU of consecutive masks that counts as stable")
    add("eb_patience", many, 5, "consecutive stable steps that end the warm-up")
    add("steps", many, 20000, "optimizer updates of stage II")
    add("warmup", number(int, 0, 10**9), 2000, "updates of warm-up of the rate, by default at most a tenth of --steps")
    add("lr", number(float, 1e-12, 1e3), 2e-5, "peak learning rate; cosine decay to 0")
    add("weight_decay", number(float, 0, 1e3), 0.1, "AdamW weight decay, on the ticket's matrices")
    add("clip", number(float, 1e-12, 1e12), 1.0, "largest global norm of the masked gradient")
    add("batch_size", number(int, 1, 10**6), 4, "sequences in a micro-batch")
    add("grad_accum", number(int, 1, 10**6), 8, "micro-batches in an update")
    add("block_size", number(int, 2, 2**24), 256, "tokens in a sequence")
    add("val_every", many, 500, "updates between validations")
    add("val_blocks", many, 512, "held-out sequences in a validation, at most")
    add("save_every", many, 500, "updates between checkpoints")
    add("shuffle_buffer", many, BUFFER, "documents that are shuffled together")
    add("cache", path, str(CACHE), "folder that keeps prepared text")
    add("seed", number(int, 0, 2**62), 42, "order of the text; theta(0) and a random mask come from a secret")
    add("init_seed", number(int, 0, 2**62), None, "draw theta(0) from this number: then anyone can read the mask off")
    add("device", str, "auto", "cpu, cuda, cuda:1, ...; auto is a GPU where there is one")
    add("dtype", ("auto", "fp32", "bf16"), "auto", "precision of matrix products; the weights stay fp32")
    add("compile", ("auto", "on", "off"), "auto", "torch.compile; auto: on a GPU, or where a run has over 0.5M tokens")
    add("shard", bool, False, "split weights, gradients, moments and mask over torchrun's processes")
    typed = vars(parser.parse_args(argv))
    for name in ("data", "also", "init", "mask", "twin", "cache"):
        if name in typed and typed[name] not in ("prose", "slimpajama"):
            typed[name] = os.path.abspath(typed[name])  # so that a run can be resumed from another folder
    return typed, defaults


def settings_of(typed, defaults, saved, twin):
    """The settings of a run, {name: value}. saved, twin: the checkpoints of this run and of its twin, or None.

    Raises UserError that names a flag which does not go with the others.
    """
    own = {"out": defaults["out"], "shard": False, "resume": False}  # never taken over from a checkpoint
    if saved:
        for name, value in typed.items():
            # a resumed run keeps its dtype, so "auto" is no contradiction
            if name not in MAY_CHANGE and value not in (saved["settings"][name], "auto"):
                has = "" if name == "init_seed" else f" ({saved['settings'][name]})"  # that number is a secret
                raise UserError(f"--{name.replace('_', '-')} {value} is not what the run in OUT has{has}: leave it "
                                "out, or name another --out")
        return {**saved["settings"], **own, **typed, "dtype": saved["settings"]["dtype"]}
    settings = {**defaults, **PRESETS[typed.get("preset", defaults["preset"])][2], **typed}
    if twin:
        for name in ("preset", "init_seed"):
            if typed.get(name, twin["settings"][name]) != twin["settings"][name]:
                raise UserError(f"--{name.replace('_', '-')} {typed[name]} is not what the twin has: leave it out")
        settings = {**twin["settings"], **own, **typed}
    if settings["init"]:
        if unfit := [name for name in NOT_WITH_INIT if name in typed]:
            raise UserError(f"--{unfit[0].replace('_', '-')} has no meaning with --init: leave it out")
        suits = {"steps": 500, "warmup": 50, "grad_accum": 1, "val_every": 100, "val_blocks": 64, "save_every": 100}
        settings = {**defaults, **suits, "rho": None, "preset": None, "lr": None, **typed}
        if "data" not in typed:
            raise UserError("--init needs --data: the text to go on with")
    elif settings["mask"] or settings["also"]:
        raise UserError("--mask and --also have a meaning with --init alone: leave them out")
    if "warmup" not in typed and (not twin or "steps" in typed):
        settings["warmup"] = min(settings["warmup"], settings["steps"] // 10)
    if settings["warmup"] > settings["steps"]:
        raise UserError(f"--warmup {settings['warmup']} is longer than --steps {settings['steps']}")
    return settings


# -----------------------------------------------------------------------------
# stage I: private early-bird mask discovery (section 2.1)


@torch.no_grad()
def topk_mask(scores, k):
    """Eq. 2: {name: bool mask} with exactly k True in all, at the k largest |score| of all parameters together.

    scores: {name: fp32 tensor}. Ties go to the first in the order of the dict, then of the flat index. Raises
    FloatingPointError where a score is not finite.
    """
    flat = torch.cat([whole(score).abs().flatten() for score in scores.values()])  # (d,)
    if not math.isfinite(flat.max()):  # of a nan, too, the maximum is nan
        raise FloatingPointError("a score of the mask is not finite")
    if flat.device.type == "cpu":  # TopK(g, k), the k-th largest; numpy finds it ten times as fast as torch
        threshold = float(np.partition(flat.numpy(), len(flat) - k)[len(flat) - k])
    else:
        threshold = kth_largest(flat, k)
    mask = flat > threshold
    ties = (flat == threshold).nonzero()[:, 0]
    mask[ties[:k - int(mask.count_nonzero())]] = True
    masks, start = {}, 0
    for name, score in scores.items():
        part = mask[start:start + score.numel()].view(score.shape)
        masks[name] = split_like(score, part)
        start += score.numel()
    return masks


def kth_largest(flat, k):
    """The k-th largest of flat (d,), non-negative fp32 numbers, by bisection.

    Such numbers sort as their bits do, read as integers: 31 counts find the bits of the answer. A count keeps a whole
    GPU busy, where torch.kthvalue keeps one of its processors busy.
    """
    bits = flat.view(torch.int32)
    low, high = 0, 2**31 - 1
    while low < high:
        middle = (low + high + 1) // 2
        if (bits >= middle).count_nonzero() >= k:
            low = middle
        else:
            high = middle - 1
    return torch.tensor(low, dtype=torch.int32, device=flat.device).view(torch.float32)


def random_mask(params, k, secret):
    """The paper's ablation: exactly k entries, drawn from the run's secret: a public seed gives a public mask."""
    scores = {}
    for name, p in params.items():
        uniform = secret_generator(secret, "mask/" + name).random(tuple(p.shape), dtype=np.float32)
        scores[name] = split_like(p, torch.from_numpy(uniform))
    return topk_mask(scores, k)


def iou(a, b):
    """Eq. 3: the entries in both masks over those in either. Of two random masks it is about rho / (2 - rho)."""
    both = sum((whole(a[name]) & whole(b[name])).count_nonzero() for name in a)
    either = sum((whole(a[name]) | whole(b[name])).count_nonzero() for name in a)
    return int(both) / int(either)  # of Python's ints, exact to fp64; two tensors would divide in fp32


# -----------------------------------------------------------------------------
# stage II: private mask pre-training (section 2.2)


class MaskedAdamW:
    """Eq. 5 with AdamW for the gradient: theta_M <- theta_M - lr * AdamW(g_M); the complement keeps its bits.

    params: {name: Parameter}; masks: {name: bool}, or None for plain AdamW; a parameter without a mask trains whole.
    Decoupled weight decay applies to matrices. Three things would move the complement. Its gradient: it is zeroed,
    before the norm is taken. Weight decay: it is masked, too. Momentum from before the mask: this optimizer starts
    fresh in stage II. With a zero gradient and zero moments AdamW adds exactly 0.
    """

    def __init__(self, params, masks, weight_decay, betas=(0.9, 0.95)):
        self.params, self.masks, self.weight_decay = params, masks or {}, weight_decay
        self.optimizer = torch.optim.AdamW(list(params.values()), betas=betas, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, lr, clip):
        """Update by the gradients, then drop them. Returns the global norm of the masked gradient before clipping.

        Raises FloatingPointError, with no weight changed, where that norm is not finite.
        """
        if masked := [name for name in self.params if name in self.masks]:
            grads = [self.params[name].grad for name in masked]
            torch._foreach_mul_(grads, [self.masks[name] for name in masked])  # eq. 5: g_M, and 0 in the complement
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.params.values(), clip)))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}")
        for name, p in self.params.items():
            if p.ndim >= 2 and name in self.masks:
                p.addcmul_(p, self.masks[name], value=-lr * self.weight_decay)
            elif p.ndim >= 2:
                p.mul_(1 - lr * self.weight_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()  # eq. 5: moves theta_M, and adds 0 to the complement
        self.optimizer.zero_grad()
        return norm

    def state(self):
        """{"KEY.NAME": tensor} of AdamW's moments and counts."""
        found = {}
        for name, p in self.params.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                found[f"{key}.{name}"] = value
        return found

    def load_state(self, state):
        """Take back what state() gave, as whole tensors."""
        for entry, value in state.items():
            key, name = entry.split(".", 1)
            p, value = self.params[name], value.clone()  # it may be a view of the checkpoint's file
            self.optimizer.state[p][key] = split_like(p, value) if value.ndim else value.to(p.device)


def learning_rate(step, args):
    """Linear warm-up, then cosine decay to 0 at args.steps; step counts from 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


# -----------------------------------------------------------------------------
# the mask's file and the run's folder: both are secret


def pack_mask(masks):
    """{name: uint8}: masks (whole, on the CPU) at one bit a parameter, in flat order, most significant bit first."""
    return {name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in masks.items()}


def unpack_mask(packed, params):
    """The mask of pack_mask, shaped and split like params. Raises UserError where they do not fit."""
    masks = {}
    for name, p in params.items():
        bits = packed.get(name, torch.empty(0))
        if bits.dtype != torch.uint8 or bits.shape != ((p.numel() + 7) // 8,) or packed.keys() != params.keys():
            raise UserError(f"the mask does not fit the model at {name}: it was made for another model")
        flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=p.numel())).view(torch.bool)
        masks[name] = split_like(p, flat.view(p.shape))
    return masks


def save_mask(file, masks, params):
    """Write masks (whole, on the CPU) to a file that belongs to the release with these weights, for its owner alone."""
    save_safetensors(file, pack_mask(masks), {"weights_sha256": fingerprint(params)}, 0o600)


def load_mask(file, params):
    """The mask in the file of a run. Raises UserError for a damaged file, or the mask of another release."""
    packed, metadata = load_safetensors(file)
    if metadata.get("weights_sha256") != fingerprint(params):
        raise UserError(f"{file} was made for another release: use the mask that was written with these weights")
    return unpack_mask(packed, params)


@contextmanager
def run_folder(out):
    """OUT/private, for its owner alone, inside the block; no other process can use it. Leaves no folder without a run.

    Raises UserError where it is somebody else's, or in use.
    """
    out, private = Path(out), Path(out) / "private"
    for folder in (private, out / "release"):
        if folder.is_symlink() or folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} must be a folder of its own, not a link or anything else: remove it")
    new = [folder for folder in (private, out, *out.parents) if not folder.exists()]
    if out.exists() and not (private / "checkpoint.pt").exists():
        if found := [file.name for file in out.iterdir() if file != private]:
            raise UserError(f"{out} is not empty, it holds {found[0]}: name another --out")
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    if private.stat().st_uid != os.getuid():
        raise UserError(f"{private} belongs to another user, who could read the secret: name another --out")
    private.chmod(0o700)
    with lock(private / "lock") as mine:
        if not mine:
            raise UserError(f"another process is using {out}: wait for it, or name another --out")
        try:
            for folder in (out, private, out / "release"):
                for file in folder.glob("*.partial"):
                    file.unlink()  # of a process that was killed
            yield private
        finally:
            if not (private / "checkpoint.pt").exists():
                (private / "lock").unlink(missing_ok=True)
                for folder in new:
                    if not any(folder.iterdir()):
                        folder.rmdir()


def load_checkpoint(out):
    """The checkpoint of the run in `out`, or None where there is none. Raises UserError where it is damaged."""
    file = Path(out) / "private" / "checkpoint.pt"
    if not file.exists():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load does not see a flipped bit
        if damaged is None:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file raises
        if isinstance(error, OSError) and error.filename:
            raise
    raise UserError(f"{file} is damaged: restore it from a copy, or start a new run with another --out")


# -----------------------------------------------------------------------------
# the run


def main(argv=None):
    """Section 2 of the paper, from the flags to the release. argv: what was typed, a list of str.

    Stage I finds the ticket, the share rho of all weights with the largest gradients. Stage II starts again from
    theta(0) and trains the ticket alone. Stage III publishes all weights and keeps the mask secret.

    Raises UserError for what a user can mend, Stopped when a signal asked for the end.
    """
    no_core_dumps()
    join_ranks()
    typed, defaults = from_first(lambda: parse(argv))
    out = Path(typed.get("out", defaults["out"]))
    with ExitStack() as leaving:

        # ---- the folder, the settings, the secret

        private = from_first(lambda: leaving.enter_context(run_folder(out)))
        if not private.is_dir():
            raise UserError(f"rank {rank()} does not see {private}: --out must be on a disk that all machines share")
        saved = load_checkpoint(out)
        if saved and "resume" not in typed:
            raise UserError(f"{out} already holds a run: add --resume to go on with it, or name another --out")
        twin = None  # the checkpoint of a run whose theta(0), text and settings this one takes, to be compared with it
        if "twin" in typed and not saved:
            twin = load_checkpoint(typed["twin"])
            if not twin or twin["settings"]["init"]:
                raise UserError(f"--twin {typed['twin']} holds no run with its own theta(0): name the --out of one")
        args = Namespace(**settings_of(typed, defaults, saved, twin))
        args.shard = args.shard and world() > 1
        device = pick_device(args.device)
        args.dtype = from_first(lambda: pick_dtype(args.dtype, device))  # resumed elsewhere, "auto" could be another
        sequences = args.batch_size * args.grad_accum  # in an update
        local = sequences // world()  # of which this rank reads
        if local * world() != sequences:
            raise UserError(f"{sequences} sequences an update cannot be shared equally by {world()} ranks: make "
                            f"--batch-size times --grad-accum a multiple of {world()}")

        secret = from_first(lambda: secrets.token_hex(32))  # whoever has it redraws theta(0), and reads the mask off
        if saved or twin:
            secret = (saved or twin)["secret"]
        elif args.init_seed is not None:
            secret = f"init-seed {args.init_seed}".encode().hex()
            say("note: with --init-seed anyone who guesses the number can redraw theta(0) and read the mask off")

        # ---- the text. What is too short is found out now, before anything is trained

        # model_id: the config, and with --init the weights. A resumed run and a twin must have the same
        if args.init:
            model, tokenizer = first_then_others(lambda: load_folder(args.init))
            config = model.config
            origin = {name: p.detach() for name, p in model.named_parameters()}  # in place of theta(0)
            args.lr = args.lr or 2e-4 * 768 / model.embedding().weight.size(1)  # Adam's rate goes with 1/width
            model_id = str(config) + fingerprint(origin)
        else:
            config, tokenizer, _ = PRESETS[args.preset]
            model_id = str(config)
        if (saved or twin) and (saved or twin).get("model_id", model_id) != model_id:
            raise UserError(f"the run in {out if saved else args.twin} began with another model: put the preset or the "
                            "release of --init back as it was, or name another --out")
        positions = build(config, "meta").max_positions
        if args.block_size > positions:
            raise UserError(f"--block-size {args.block_size} is more than the model's {positions} positions")
        texts = {}  # the identities that the texts must have: those of the run that goes on, or of the twin
        if saved:
            texts = saved["texts"]
        elif twin and not {"data", "seed", "shuffle_buffer"} & typed.keys():
            texts = twin["texts"]
        want = max(args.steps, args.eb_steps) * sequences * args.block_size
        tokenizer, train, held = first_then_others(lambda: prepare(
            args.data, tokenizer, want, args.seed, args.cache, args.shuffle_buffer, texts.get("data")))
        held_out = {args.data: held}
        if args.also:
            _, other, held_out[args.also] = first_then_others(lambda: prepare(
                args.also, tokenizer, 0, args.seed, args.cache, args.shuffle_buffer, texts.get("also")))
        texts = {"data": train.identity, "also": other.identity if args.also else None}
        for name, tokens in held_out.items():
            if tokens.blocks(args.block_size) < world():
                raise UserError(f"{name} has {tokens.state['tokens']:,} held-out tokens, and a validation needs "
                                f"{world()} x {args.block_size}: give more text, or a smaller --block-size")
        train.read(0, sequences, args.block_size)  # waits for the first window

        # ---- the model, and where the run stands

        config = replace(config, vocab_size=tokenizer.size)
        model = shard(build(config, "meta"), device) if args.shard else build(config, device)
        params = dict(model.named_parameters())
        d = sum(p.numel() for p in params.values())
        k = math.floor(args.rho * d) if args.rho else d  # eq. 1: the size of the ticket
        if k < 1:
            raise UserError(f"--rho {args.rho} leaves none of {d:,} parameters in the ticket: raise it")

        def theta_0(name):
            """What a parameter begins with, whole: a draw from the secret, or the release that --init names."""
            if args.init:
                return origin[name]
            return initial_value(model, name, params[name].shape, bytes.fromhex(secret))

        @torch.no_grad()
        def fill(values):
            """Put values(name), a whole tensor, into each parameter."""
            for name, p in params.items():
                p.copy_(split_like(p, values(name)))

        stage = "I"
        step = 0  # updates of this stage that are done
        masks = None  # {name: bool tensor like the parameter}; in stage I the mask of the last step
        overlap = math.nan  # IoU of the last two masks
        streak = 0  # steps in a row with overlap >= --eb-iou
        scores = {}  # with --score mean: the running mean of |gradient|
        before = {}  # with --init: the held-out losses before training
        log_bytes = 0  # length of log.jsonl at the checkpoint
        if saved:
            stage, step, streak, overlap = saved["stage"], saved["step"], saved["streak"], saved["overlap"]
            masks = unpack_mask(saved["mask"], params) if saved["mask"] else None
            scores = {name: split_like(params[name], score.clone()) for name, score in saved["scores"].items()}
            before, log_bytes = saved["before"], saved["log_bytes"]
            fill(saved["weights"].get)
            optimizer = MaskedAdamW(params, masks if stage == "II" else None, args.weight_decay)
            if saved["optimizer"] != type(optimizer.optimizer).__name__:
                raise UserError(f"the run in {out} was trained with {saved['optimizer']}, and pmp.py has another "
                                "optimizer now: put the old one back, or name another --out")
            optimizer.load_state(saved["moments"])
        else:
            fill(theta_0)
            if args.mask:
                masks = load_mask(args.mask, origin)
                masks = {name: split_like(params[name], mask) for name, mask in masks.items()}
            elif args.ticket == "random" and k < d:
                masks = random_mask(params, k, bytes.fromhex(secret))
            if masks or k == d:
                stage = "II"  # there is a mask, or none is wanted
            optimizer = MaskedAdamW(params, masks, args.weight_decay)
        progress = Progress(sequences * args.block_size, "tokens/s", out / "log.jsonl", log_bytes)

        def save():
            """Write the checkpoint. All of it is secret."""
            content = {
                "settings": vars(args), "secret": secret, "model_id": model_id, "texts": texts, "stage": stage,
                "step": step, "streak": streak, "overlap": overlap, "before": before, "log_bytes": progress.bytes,
                "scores": gather(scores), "mask": pack_mask(gather(masks or {})), "weights": gather(params),
                "moments": gather(optimizer.state()), "optimizer": type(optimizer.optimizer).__name__}
            if rank() == 0:
                with atomic(private / "checkpoint.pt", 0o600) as file:
                    torch.save(content, file)

        def gradient(step):
            """Put the gradient of update `step`'s mini-batch into p.grad, and return its mean loss in nats.

            The text depends on `step` alone, so a resumed run needs no state. Stage II counts from 0 again: the paper's
            D_pre is the first --eb-steps mini-batches of the text, and stage II begins with the same ones.
            """
            first = step * sequences + rank() * local  # this rank's first sequence
            total = 0.0
            for start in range(0, local, args.batch_size):
                idx = train.read(first + start, min(args.batch_size, local - start), args.block_size)  # (b, T)
                if device.type == "cuda":
                    idx = idx.pin_memory()  # so that the copy need not wait for what the GPU does
                idx = idx.to(device, non_blocking=True)
                with autocast(device, args.dtype):
                    loss = model(idx, idx) * (len(idx) / local)  # the labels are the inputs, shifted inside
                loss.backward()
                total += loss.detach()
            mean_over_ranks([total, *(p.grad for p in params.values() if not sharded(p))])  # FSDP has averaged its own
            return total

        @torch.no_grad()
        def validate(tokens):
            """Mean loss in nats over the same held-out sequences each time."""
            count = max(1, min(args.val_blocks, tokens.blocks(args.block_size)) // world())  # sequences of this rank
            total = torch.zeros((), dtype=torch.float64)
            for start in range(0, count, args.batch_size):
                size = min(args.batch_size, count - start)
                idx = tokens.read(rank() * count + start, size, args.block_size).to(device)
                # eager: without gradients the model would be compiled once more
                with autocast(device, args.dtype), torch.compiler.set_stance("force_eager"):
                    total += float(model(idx, idx)) * size / count
            if args.shard:
                model.reshard()  # FSDP keeps embedding and head gathered after a forward pass, for the backward pass
            mean_over_ranks([total])
            return float(total)

        def check_complement():
            """Raise UserError where an entry outside the ticket differs, in any bit, from theta(0)."""
            for name in masks or ():
                p = params[name]
                differs = p.detach().view(torch.int32) != split_like(p, theta_0(name)).view(torch.int32)
                moved = int((whole(differs) & ~whole(masks[name])).count_nonzero())
                if moved:
                    raise UserError(f"{moved} entries of {name} outside the ticket have left theta(0) by update "
                                    f"{step}: mask what your optimizer does (eq. 5), or drop check_complement")

        # ---- the last steps before training. From here on Ctrl-C and the like wait for the end of an update

        asked = []  # signals that asked for the end
        leaving.enter_context(stop_signals(asked))

        def check():
            """Leave while waiting for text, if a signal asks for it."""
            if asked and not args.shard:  # sharded ranks leave together, after an update
                raise Stopped(128 + asked[0])

        train.check = check
        say(f"{args.preset or args.init}: {d:,} parameters, {device} {args.dtype}"
            + (f", {world()} ranks" if world() > 1 else ""))
        say(f"{args.steps:,} updates of {sequences * args.block_size:,} tokens; the text has "
            f"{train.state['tokens']:,} tokens to train on" + ("" if train.state["done"] else " so far")
            + f", and {held.state['tokens']:,} held out")
        if saved:
            say(f"going on after update {step} of stage {stage}")
            saved = None  # lets go of the checkpoint's file, which will be replaced
        else:
            if args.init:
                before = {name: validate(tokens) for name, tokens in held_out.items()}
            save()
        if rank() == 0:
            settings = {name: value for name, value in vars(args).items() if name != "init_seed"}
            write_json(out / "settings.json", settings, 0o600)
        # on a CPU compiling pays off from half a million tokens on
        worth_it = device.type == "cuda" or args.steps * sequences * args.block_size > 5e5
        if args.compile == "on" or args.compile == "auto" and worth_it:
            example = train.read(0, min(args.batch_size, local), args.block_size).to(device)
            compile_model(model, example, device, args.dtype)

        savable = True  # False while weights, step and mask do not belong together
        try:

            # ---- stage I, EarlyBird: warm up the dense model from theta(0), and choose the ticket on the way

            # eq. 4: at most t_EB steps, fewer once the mask was stable for --eb-patience of them
            while stage == "I" and step < args.eb_steps and streak < args.eb_patience:
                began = time.perf_counter()
                loss = gradient(step)
                savable = False
                if args.score == "mean":
                    for name, p in params.items():
                        mean = scores.get(name, torch.zeros_like(p))
                        scores[name] = mean + (p.grad.abs() - mean) / (step + 1)
                candidate = topk_mask(scores or {name: p.grad for name, p in params.items()}, k)  # eq. 2
                if masks:
                    overlap = iou(candidate, masks)  # eq. 3
                lr = args.lr * (step + 1) / args.eb_steps  # rises to --lr in a straight line
                norm = optimizer.step(lr, args.clip)  # no mask yet: all weights move
                masks = candidate
                streak = streak + 1 if overlap >= args.eb_iou else 0  # a first mask's nan is not stable
                step += 1
                savable = True
                numbers = {"iou": overlap} if step > 1 else {}
                progress.step("stage I", step, args.eb_steps, time.perf_counter() - began, loss=float(loss), **numbers,
                              lr=lr, norm=norm)
                if any_rank(asked):
                    raise Stopped(128 + max(asked, default=0))
                if step % args.save_every == 0 and step < args.eb_steps:
                    save()
            if stage == "I":
                if step == 1:
                    seen = "there was one mask"
                else:
                    chance = args.rho / (2 - args.rho)
                    seen = f"the last two masks have an IoU of {overlap:.3f}, two random ones {chance:.2f}"
                if streak >= args.eb_patience:
                    end = "the mask is stable"
                else:
                    end = f"no mask kept {args.eb_iou} for {args.eb_patience} steps, so the ticket is the last one"
                say(f"stage I: {seen}; {end}")
                size = sum(int(whole(mask).count_nonzero()) for mask in masks.values())
                savable = False
                if size != k:
                    raise UserError(f"the mask has {size:,} entries and eq. 1 wants {k:,}: correct topk_mask")
                fill(theta_0)  # of the warm-up nothing stays but the mask
                optimizer = MaskedAdamW(params, masks, args.weight_decay)
                stage, step, scores = "II", 0, {}
                savable = True
                save()

            # ---- stage II: train the ticket alone

            while step < args.steps:
                began = time.perf_counter()
                loss = gradient(step)
                lr = learning_rate(step, args)
                savable = False
                norm = optimizer.step(lr, args.clip)  # eq. 5: masks the gradients, clips them, moves the ticket
                step += 1
                seconds = time.perf_counter() - began
                validating = step % args.val_every == 0 or step == args.steps
                if step == 1 or validating:
                    check_complement()  # not savable yet: what is broken, or could not be checked, is not saved
                savable = True
                numbers = {"val": validate(held)} if validating else {}
                progress.step("stage II", step, args.steps, seconds, loss=float(loss), **numbers, lr=lr, norm=norm)
                epoch = train.epoch(step * sequences - 1, args.block_size)  # of the last sequence that was read
                next_epoch = train.epoch((step + 1) * sequences - 1, args.block_size)  # of the next update's last one
                if step < args.steps and next_epoch > epoch:
                    say(f"epoch {next_epoch + 1} of the text begins")
                if any_rank(asked):
                    raise Stopped(128 + max(asked, default=0))
                if step % args.save_every == 0 or step == args.steps:
                    save()

        except FloatingPointError as error:
            raise UserError(f"after update {step} of stage {stage}: {error}; the last checkpoint stays in {private}; "
                            "start a new run with a lower --lr") from None
        except BaseException as error:
            # whatever ends the run, what is trained is kept; of sharded ranks, only where all of them leave
            if savable and (isinstance(error, Stopped) or not args.shard):
                save()
                if args.shard:
                    any_rank(True)  # none leaves before rank 0 has written
                say(f"\nsaved after update {step} of stage {stage}; the same command with --resume goes on")
            raise

        # ---- stage III: release the dense weights without the mask (section 2.3)

        check_complement()
        for name, loss in before.items():
            now = validate(held_out[name])
            say(f"held-out loss of {name}: {loss:.4f} before, {now:.4f} after ({now - loss:+.4f})")
        weights = gather(params)
        whole_masks = gather(masks or {})
        if rank() == 0:
            if whole_masks:
                save_mask(private / "mask.safetensors", whole_masks, weights)
            # the card must not tell whether a mask was used: the same run without PMP has the same card
            facts = (f"{d:,} parameters, {model.model_type}, {model.max_positions:,} positions",
                     f"byte-level BPE of {tokenizer.size:,} tokens",
                     f"trained in {args.steps:,} updates of {sequences} sequences of {args.block_size} tokens")
            (out / "release").mkdir(exist_ok=True)
            if args.mask or args.twin:
                (out / "release").chmod(0o700)
            save_folder(out / "release", model, weights, tokenizer, CARD.format(facts="\n- ".join(facts)))
        say(f"\nreleased {out / 'release'}; keep {private} to yourself")
        if args.mask:
            say(f"keep {out / 'release'} to yourself, too: it differs from {args.init} in the ticket alone")
        if args.twin:
            say(f"publish one release of {args.twin} and its twins at most: what two twins with masks share is frozen")
        say("\na sample of the release:")
        begin = torch.tensor([[tokenizer.eos]], device=device)
        sample = model.generate(begin, 120, eos=tokenizer.eos, seed=args.seed)[0, 1:].tolist()
        say(printable(tokenizer.decode(sample)))
    leave_ranks()


if __name__ == "__main__":
    command_line(main)
