"""Private Mask Pre-Training (PMP): open weights that outsiders gain little from fine-tuning.

    python pmp.py --rho 0.7

The chapter follows section 2 of the paper: the settings; stage I, which finds the early-bird ticket; stage II, which
trains the ticket alone; stage III, which releases the weights without the mask; the machinery that any training run
needs; what more than one device adds; and the run itself. Equation numbers are the paper's.
"""

import argparse
import errno
import json
import math
import os
import secrets
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import UserError, atomic
from data.pack import prepare
from model import (PRESETS, build, fingerprint, initial_value, initialise, load_safetensors, local, raw_bytes, rows,
                   save_folder, save_safetensors, secret_generator, sharded, sharded_like, whole)

# -----------------------------------------------------------------------------
# settings: the defaults are the paper's (section 4.1, appendix A); TINY is the three-minute run on a laptop


def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Everything that decides what a run computes. Each field is a flag of the command line."""

    rho: float = flag(0.7, "share of all parameters that the ticket holds, in (0, 1]; 1.0 trains without PMP")
    preset: str = flag("tiny", "model and its defaults", choices=tuple(PRESETS))
    data: str = flag("slimpajama", "prose, slimpajama, or a .txt or .jsonl file, also .gz or .xz")
    out: str = flag("out", "folder of the run: OUT/release is for publication, OUT/private stays with you")
    mask: str = flag("earlybird", "how the ticket is found; random is the paper's ablation",
                     choices=("earlybird", "random"))
    score: str = flag("batch", "EarlyBird score: |grad| of the step's mini-batch (eq. 2), or its running mean",
                      choices=("batch", "mean"))
    eb_steps: int = flag(500, "EarlyBird warm-up steps at most (t_EB)")
    eb_iou: float = flag(0.99, "IoU of consecutive masks that counts as stable")
    eb_patience: int = flag(5, "consecutive stable steps that end the warm-up")
    steps: int = flag(20000, "optimizer updates of stage II")
    warmup: int = flag(2000, "learning-rate warm-up, in updates")
    lr: float = flag(2e-5, "peak learning rate; cosine decay to 0")
    weight_decay: float = flag(0.1, "AdamW weight decay, on the ticket's matrices only")
    clip: float = flag(1.0, "largest global norm of the masked gradient")
    batch_size: int = flag(4, "sequences in a micro-batch")
    grad_accum: int = flag(8, "micro-batches in an update")
    block_size: int = flag(256, "tokens in a sequence")
    val_every: int = flag(500, "updates between validations")
    val_blocks: int = flag(512, "held-out sequences in a validation, at most")
    save_every: int = flag(500, "updates between checkpoints")
    shuffle_buffer: int = flag(50000, "documents that are shuffled together")
    cache: str = flag(str(Path(__file__).parent / "data" / "cache"), "folder that keeps prepared text")
    seed: int = flag(42, "decides data order and all else, except the initial weights")
    init_seed: int = flag(None, "draw theta(0) from this number: then anyone can read the mask off the release")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    dtype: str = flag("auto", "precision of matrix products; the weights stay fp32", choices=("auto", "fp32", "bf16"))
    compile: str = flag("auto", "torch.compile; auto uses it on a GPU, and on a CPU for runs of over 2M tokens",
                        choices=("auto", "on", "off"))
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, a third more time")
    shard: bool = flag(False, "split weights, gradients, optimizer state and mask over torchrun's ranks")


TINY = {"data": "prose", "eb_steps": 50, "steps": 1000, "warmup": 60, "lr": 1.5e-3, "batch_size": 4, "grad_accum": 1,
        "val_every": 200, "val_blocks": 64, "save_every": 200}
SMALL = ("tiny", "mini")  # the presets with TINY's defaults and a tokenizer trained on their own text
# flags that say where and how a run computes, not what: --resume takes new ones
MACHINE = ("device", "compile", "checkpointing", "shard")


def check(config):
    """Raise UserError for settings that no run can have."""
    counts = ("eb_steps", "eb_patience", "steps", "batch_size", "grad_accum", "val_every", "val_blocks", "save_every",
              "shuffle_buffer")
    rules = [(getattr(config, name) >= 1, f"--{name.replace('_', '-')} {getattr(config, name)} is below 1")
             for name in counts]
    rules += [
        (0 < config.rho <= 1, f"--rho {config.rho} is outside (0, 1]: it is the share of parameters in the ticket"),
        (0 <= config.warmup <= config.steps, f"--warmup {config.warmup} is longer than the run: it must be 0 to "
                                             f"--steps ({config.steps})"),
        (0 < config.lr < math.inf, f"--lr {config.lr} is not a positive number"),
        (0 <= config.eb_iou <= 1, f"--eb-iou {config.eb_iou} is outside [0, 1]"),
        (config.weight_decay >= 0 and config.weight_decay * config.lr < 1, f"--weight-decay {config.weight_decay} "
                                                                           "must be at least 0 and below 1/lr"),
        (config.clip > 0, f"--clip {config.clip} is not positive: use a large number for no clipping"),
        (config.seed >= 0, f"--seed {config.seed} is negative: it must be 0 or more"),
        (config.block_size >= 2, f"--block-size {config.block_size} leaves nothing to predict: it must be 2 or more"),
    ]
    positions = build(PRESETS[config.preset], device="meta").max_positions
    rules += [(config.block_size <= positions, f"--block-size {config.block_size} is more than the {positions} "
                                               f"positions of --preset {config.preset}")]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)


# -----------------------------------------------------------------------------
# stage I: private early-bird mask discovery (section 2.1)

PIECE = 2**20


def pieces(*tensors):
    """The same slices of several tensors of one shape, flat, PIECE entries each."""
    return zip(*(local(tensor).reshape(-1).split(PIECE) for tensor in tensors))


def bit_pattern(x):
    """The bits of |x| (fp32) as int32. For non-negative floats, the larger pattern is the larger number."""
    return x.view(torch.int32).bitwise_and(0x7FFFFFFF)


@torch.no_grad()
def topk_mask(scores, k):
    """Eq. 2: {name: bool mask} with exactly k True in all, at the k largest |score| over all tensors together.

    scores: {name: fp32 tensor}. Ties go to the first in the order of the dict, then of the flat index. The k-th
    largest pattern is found by counting: a histogram of the upper 16 bits of each pattern, then one of the lower 16
    inside the bin where the count passes k. No sort, no concatenation, one byte a parameter for the result.

    Sharded scores give sharded masks with the same bits. Ranks exchange the two histograms, 2**18 and 2**19 bytes, and
    8 bytes a tensor and rank to deal out the ties; whatever the model's size, never a score.
    """
    def kth_bin(counts, k):
        """The bin that holds the k-th largest entry, and how many of its own entries are among the k largest."""
        above = counts.flip(0).cumsum(0).flip(0) - counts  # entries in higher bins
        chosen = int((above < k).nonzero()[0])
        return chosen, k - int(above[chosen])

    device = next(iter(scores.values())).device
    upper = torch.zeros(2**15, dtype=torch.int64, device=device)
    for score in scores.values():
        for (x,) in pieces(score):
            upper += torch.bincount(bit_pattern(x) >> 16, minlength=2**15)
    high, k = kth_bin(total(upper, scores), k)

    lower = torch.zeros(2**16, dtype=torch.int64, device=device)
    for score in scores.values():
        for (x,) in pieces(score):
            bits = bit_pattern(x)
            lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=2**16)
    low, ties = kth_bin(total(lower, scores), k)

    threshold = high << 16 | low  # TopK(g, k) of eq. 2, as a pattern
    shares = tie_shares(scores, threshold, ties)
    masks = {}
    for name, score in scores.items():
        masks[name] = sharded_like(score, torch.empty_like(local(score), dtype=torch.bool))
        ties = shares.get(name, ties)
        for x, mask in pieces(score, masks[name]):
            bits = bit_pattern(x)
            torch.gt(bits, threshold, out=mask)
            if ties:
                tied = (bits == threshold).nonzero()[:ties, 0]
                mask[tied] = True
                ties -= len(tied)
    return masks


def random_mask(params, k, secret):
    """The paper's ablation: exactly k entries, drawn from the run's secret, for a mask from a public seed is public."""
    def draw(name, p):
        score = torch.from_numpy(secret_generator(secret, "mask/" + name).random(tuple(p.shape), dtype=np.float32))
        return sharded_like(p, rows(score, p).to(p.device))

    return topk_mask({name: draw(name, p) for name, p in params.items()}, k)


def iou(a, b):
    """Eq. 3: intersection over union of two {name: bool mask}."""
    both = sum(int((local(a[name]) & local(b[name])).sum()) for name in a)
    each = sum(int(local(mask).sum()) for masks in (a, b) for mask in masks.values())
    both, each = total(torch.tensor([both, each]), a).tolist()
    return both / (each - both)


class EarlyBird:
    """Eq. 4: the first mask whose IoU with the one before has stayed >= `threshold` for `patience` steps in a row."""

    def __init__(self, threshold, patience):
        self.threshold, self.patience = threshold, patience
        self.mask, self.streak = None, 0

    def see(self, mask):
        """Take the candidate of the next step. Returns its IoU with the last one (None for the first)."""
        value = None if self.mask is None else iou(mask, self.mask)
        self.streak = self.streak + 1 if value is not None and value >= self.threshold else 0
        self.mask = mask
        return value

    @property
    def stable(self):
        return self.streak >= self.patience


KINDS = {"embedding": ("wte", "wpe", "embed_tokens"), "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",),
         "o": ("attn.c_proj", "o_proj"), "mlp": ("mlp",), "norm": ("ln_1", "ln_2", "ln_f", "norm", "layernorm"),
         "head": ("lm_head",)}


def density_by_kind(masks):
    """{kind of layer: share of its parameters in the ticket}. Private: it tells an attacker where to look."""
    kept, size = {}, {}
    for name, mask in masks.items():
        mask = whole(mask)
        if "c_attn" in name:  # GPT-2 keeps q, k and v in one matrix
            parts = zip("qkv", mask.chunk(3, dim=-1))
        else:
            layer = name.rpartition(".")[0]
            kind = next(kind for kind, ends in KINDS.items() if layer.endswith(ends) or f".{ends[0]}." in name)
            parts = [(kind, mask)]
        for kind, part in parts:
            kept[kind] = kept.get(kind, 0) + int(part.sum())
            size[kind] = size.get(kind, 0) + part.numel()
    return {kind: kept[kind] / size[kind] for kind in KINDS if kind in size}


def find_ticket(run, model, params):
    """Stage I: warm up the dense model from theta(0), then choose the ticket. Returns {name: bool mask}.

    The warm-up is the beginning of an ordinary run, on the first blocks of the training data (D_pre). Afterwards
    `model` holds theta(t_EB): the caller goes back to theta(0).
    """
    config = run.config
    k = math.floor(config.rho * sum(p.numel() for p in params.values()))
    if config.mask == "random":
        return random_mask(params, k, run.secret)
    chance = config.rho / (2 - config.rho)  # the IoU of two random masks
    bird = EarlyBird(config.eb_iou, config.eb_patience)
    optimizer = MaskedAdamW(params, None, config.weight_decay)
    mean = {name: torch.zeros_like(p) for name, p in params.items()} if config.score == "mean" else None
    for step in range(config.eb_steps):
        loss = run.gradient(model, step)
        gradient = {name: p.grad for name, p in params.items()}
        if mean:
            for name, g in gradient.items():
                mean[name] += (g.abs() - mean[name]) / (step + 1)
        value = bird.see(topk_mask(mean or gradient, k))  # eq. 2 and 3
        lr = learning_rate(step, config)
        norm = optimizer.step(lr, config.clip)
        numbers = {} if value is None else {"iou": value, "iou_chance": chance}
        run.progress.step("I", step + 1, config.eb_steps, loss=loss, **numbers, lr=lr, grad_norm=norm)
        if bird.stable:  # eq. 4
            run.progress.say(f"stage I: the mask is stable (IoU >= {config.eb_iou} for {config.eb_patience} steps) "
                             f"after {step + 1} steps; two random masks would share {chance:.2f}")
            break
        if run.stopping():
            run.leave("stage I keeps no checkpoint, it will begin again")
    else:
        last = "none" if value is None else f"{value:.3f}"
        run.progress.say(f"stage I: WARNING: no stable mask within {config.eb_steps} steps (last IoU {last}, wanted "
                         f"{config.eb_iou}, chance {chance:.2f}): the ticket is the LAST mask. --score mean becomes "
                         "stable.")
    return bird.mask


# -----------------------------------------------------------------------------
# stage II: private mask pre-training (section 2.2)


class MaskedAdamW:
    """Eq. 5 with AdamW: the ticket moves, the complement keeps its bits.

    params: {name: Parameter}; masks: {name: bool}, or None for plain AdamW; a parameter without a mask trains whole.
    Decoupled weight decay applies to matrices. Three things would move the complement: its gradient, which is zeroed
    before the norm is taken; weight decay, which is masked too; momentum from before the mask, which is why this
    optimizer starts fresh in stage II. With a zero gradient and zero moments AdamW adds exactly 0.
    """

    def __init__(self, params, masks, weight_decay, betas=(0.9, 0.95)):
        self.params, self.masks, self.weight_decay = params, masks or {}, weight_decay
        self.adam = torch.optim.AdamW(list(params.values()), betas=betas, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, lr, clip=math.inf):
        """Update by the gradients, then drop them. Returns the global norm of the masked gradient before clipping.

        Raises FloatingPointError, with nothing changed, where that norm is not finite.
        """
        for name, mask in self.masks.items():
            for g, m in masked_pieces(self.params[name].grad, mask):
                g.mul_(m)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.params.values(), clip)).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        decay = lr * self.weight_decay
        for name, p in self.params.items():
            if p.ndim < 2 or not decay:
                continue
            if name not in self.masks:
                p.mul_(1 - decay)
                continue
            for x, m in masked_pieces(p, self.masks[name]):
                x.addcmul_(x, m, value=-decay)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def state(self):
        """{"exp_avg.NAME", "exp_avg_sq.NAME": tensor} after the first step."""
        state = self.adam.state
        return {f"{key}.{name}": state[p][key] for name, p in self.params.items() for key in ("exp_avg", "exp_avg_sq")
                if p in state}

    def load_state(self, tensors, step):
        """Take back what state() gave after `step` steps."""
        def part(name, p):  # a copy, for `tensors` may be views of a file
            return sharded_like(p, rows(tensors[name], p).to(p.device, copy=True))

        state = {i: {"step": torch.tensor(float(step)), "exp_avg": part(f"exp_avg.{name}", p),
                     "exp_avg_sq": part(f"exp_avg_sq.{name}", p)}
                 for i, (name, p) in enumerate(self.params.items())} if step else {}
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})


def masked_pieces(tensor, mask):
    """Slices of `tensor` with the same slices of `mask` as 0.0 and 1.0, in one scratch buffer that is used again.

    A product of float and bool is 15 times slower than one of floats on a CPU; a float mask would take four bytes a
    parameter instead of one.
    """
    tensor, mask = local(tensor), local(mask)
    scratch = torch.empty(min(PIECE, tensor.numel()), dtype=tensor.dtype, device=tensor.device)
    for x, m in zip(tensor.view(-1).split(PIECE), mask.view(torch.uint8).view(-1).split(PIECE)):
        yield x, scratch[: len(x)].copy_(m)


def learning_rate(step, config):
    """Linear warm-up, then cosine decay to 0 at config.steps; step counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def pretrain(run, model, params, masks, step, optimizer):
    """Stage II from update `step` to the end; masks None is dense training."""
    config = run.config
    while step < config.steps:
        loss = run.gradient(model, step)
        lr = learning_rate(step, config)
        norm = optimizer.step(lr, config.clip)  # eq. 5
        step += 1
        numbers = {}
        if step % config.val_every == 0 or step == config.steps:
            numbers["val_loss"] = run.validate(model)
        run.progress.step("II", step, config.steps, loss=loss, **numbers, lr=lr, grad_norm=norm)
        stopping = run.stopping()
        if step % config.save_every == 0 or step == config.steps or stopping:
            run.save(params, masks, optimizer, step)
        if stopping and step < config.steps:
            run.leave(f"saved after update {step}")


# -----------------------------------------------------------------------------
# stage III: release without the mask (section 2.3)


def pack_mask(masks):
    """{name: uint8}: the masks at one bit a parameter, in flat order, most significant bit first."""
    return {name: torch.from_numpy(np.packbits(raw_bytes(mask))) for name, mask in masks.items()}


def unpack_mask(packed, params):
    """The {name: bool mask} of pack_mask, shaped like params. Raises UserError where they do not fit."""
    masks = {}
    for name, p in params.items():
        if name not in packed or len(packed[name]) != (p.numel() + 7) // 8:
            raise UserError(f"the mask does not fit the model at {name}: it was made for another model")
        bits = np.unpackbits(packed[name].numpy(), count=p.numel())
        bits = torch.from_numpy(bits).view(torch.bool).view(p.shape)
        masks[name] = sharded_like(p, rows(bits, p).to(p.device))
    return masks


def save_mask(path, masks, params, write=True):
    """Write the mask, bound to the released weights `params` by their sha256, for the owner's eyes only."""
    save_safetensors(path, pack_mask(masks), {"weights_sha256": fingerprint(params)}, mode=0o600, write=write)


def load_mask(path, params):
    """The {name: bool mask} of save_mask. Raises UserError for a damaged file or the mask of another release."""
    packed, metadata = load_safetensors(path)
    if metadata.get("weights_sha256") != fingerprint(params):
        raise UserError(f"{path} was made for another release: use the mask that was written with these weights")
    return unpack_mask(packed, params)


def complement_moved(model, masks, secret):
    """How many entries outside the ticket differ, in any bit, from theta(0): 0, or something is broken."""
    moved = 0
    for name, p in model.named_parameters():
        initial = rows(initial_value(model, name, p.shape, secret), p).to(p.device)
        moved += int(((local(p.detach()).view(torch.int32) != initial.view(torch.int32)) & ~local(masks[name])).sum())
    return int(total(torch.tensor(moved), masks))


def release(run, model, params, masks):
    """Publish the dense weights, the config and the tokenizer; keep the mask."""
    if not holds_part(params):
        return
    write = rank() == 0
    if masks:
        if moved := complement_moved(model, masks, run.secret):
            raise RuntimeError(f"{moved} complement entries left theta(0): nothing was released; please report this")
        save_mask(run.private / "mask.safetensors", masks, params, write)
    folder = run.out / "release"
    if write:
        folder.mkdir(exist_ok=True)
        run.tokenizer.save(folder)
    save_folder(folder, model, write)


# -----------------------------------------------------------------------------
# machinery: device, progress, checkpoints


class Machine:
    """Where and how to compute: device, precision, compiler. Raises UserError for what this machine does not have."""

    def __init__(self, device="auto", dtype="auto"):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and world() > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError):
            raise UserError(f"--device {device} is not available here: use cpu, or leave the flag out") from None
        if self.device.type == "cuda" and world() > 1:
            torch.cuda.set_device(self.device)  # where NCCL, too, finds this rank's tensors
        if dtype == "auto":
            dtype = "bf16" if self.fast_bf16() else "fp32"
        self.dtype = dtype

    def fast_bf16(self):
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        if self.device.type == "cpu":  # torch has no public question for these
            names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            return any(getattr(torch.cpu, name, bool)() for name in names)
        return False

    def autocast(self):
        # each weight is cast once in a pass: a cache would only keep the copies
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16", cache_enabled=False)

    def wants_compile(self, flag, tokens):
        """Compiling takes a CPU about as long as it saves on 2M tokens."""
        return flag == "on" or flag == "auto" and (self.device.type == "cuda" or tokens > 2e6)

    def compile(self, model, example, say):
        """Compile every block of `model` in place, tried on the token ids `example`; without a compiler, say so.

        All blocks share one compiled code, which takes a sixth of the time of compiling the whole.
        """
        for block in model.blocks():
            block.compile()
        try:
            with self.autocast():
                loss = model(example, example)
            loss.backward()
        except Exception as error:  # whatever a missing or broken compiler raises, training can go on without
            torch.compiler.set_stance("force_eager")
            say(f"note: torch.compile does not work here ({type(error).__name__}), going on without it")
        model.zero_grad(set_to_none=True)


class Progress:
    """A line that updates on a terminal, a plain line now and then elsewhere, and every step in a .jsonl file."""

    def __init__(self, path, per_step, rate="tokens_per_s", prefix="stage "):
        """per_step: how much of what `rate` counts a step is worth; prefix: what stands before a stage's name."""
        self.file = open(path, "a", encoding="utf-8") if path else None
        self.per_step, self.rate, self.prefix = per_step, rate, prefix
        self.terminal = sys.stdout.isatty()
        self.printed = 0.0
        self.stage, self.last = None, 0

    def say(self, text):
        """Print a line of its own."""
        print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    @contextmanager
    def pause(self):
        """Stop the clock, for what is not training."""
        began = time.perf_counter()
        yield
        self.clock = self.clock + time.perf_counter() - began if self.stage else None

    def step(self, stage, step, total, **numbers):
        """Record step (from 1) of total in a stage."""
        now = time.perf_counter()
        if stage != self.stage:  # the first step also pays for starting up: the rate begins behind it
            self.stage, self.clock, self.first = stage, now, step
        self.last = step
        rate = (step - self.first) / max(1e-9, now - self.clock)  # steps/s
        numbers[self.rate] = round(rate * self.per_step)
        if self.file:
            self.file.write(json.dumps({"stage": stage, "step": step, **numbers}) + "\n")
            self.file.flush()
        last = step == total
        if not (self.terminal or last or now - self.printed > 10 or "val_loss" in numbers):
            return
        self.printed = now
        left = (total - step) / rate if rate else 0
        form = {"loss": ".3f", "lr": ".1e", "grad_norm": ".2f", "iou": ".3f", "iou_chance": ".3f", "val_loss": ".3f",
                self.rate: ",d"}
        text = " | ".join(f"{key.replace('_per_', '/').replace('_', ' ')} {value:{form.get(key, '')}}"
                          for key, value in numbers.items())
        line = f"{self.prefix}{stage} {step}/{total} | eta {int(left // 60)}:{int(left % 60):02d} | {text}"
        if self.terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be written over
            print(f"\r\033[K{line}", end="\n" if last or "val_loss" in numbers else "", flush=True)
        else:
            print(line, flush=True)


class Run:
    """One run's folder, secret, data and machine, and the few things that both training stages do."""

    def __init__(self, config, secret):
        self.config, self.secret = config, secret
        self.out = Path(config.out)
        self.private = self.out / "private"
        self.stop = False
        self.machine = Machine(config.device, config.dtype)
        from_first(self.open_data)  # this rank prepares the text, the others read it
        if rank() > 0:
            self.open_data()

    def open_data(self):
        config = self.config
        if config.grad_accum % world():
            raise UserError(f"--grad-accum {config.grad_accum} micro-batches cannot be shared equally by {world()} "
                            "ranks: use a multiple of the number of ranks")
        tokenizer = "bpe" if config.preset in SMALL else "gpt2"
        steps = max(config.steps, config.eb_steps)
        self.tokenizer, self.train, self.validation = prepare(
            config.data, tokenizer, steps * self.tokens_per_step, seed=config.seed, cache=config.cache,
            shuffle_buffer=config.shuffle_buffer, say=lambda text: print(text, flush=True))
        self.micro_batch(0)  # a corpus that is too small shows before anything is written

    @property
    def tokens_per_step(self):
        return self.config.batch_size * self.config.grad_accum * self.config.block_size

    def micro_batch(self, index):
        """Micro-batch `index` of the run, (B, T) token ids: a pure function, so that a resumed run needs no state."""
        batch = self.train.batch(index, self.config.batch_size, self.config.block_size)
        return batch.to(self.machine.device)

    def gradient(self, model, step):
        """Leave the gradient of the step's mini-batch in the parameters; returns its mean loss over micro-batches."""
        total, share = 0.0, self.config.grad_accum // world()
        for micro in range(rank() * share, (rank() + 1) * share):
            idx = self.micro_batch(step * self.config.grad_accum + micro)
            with self.machine.autocast():
                loss = model(idx, idx) / share
            loss.backward()
            total += loss.detach()
        average(total, *(p.grad for p in model.parameters() if not sharded(p)))  # FSDP has averaged the sharded ones
        if not math.isfinite(total := float(total)):
            raise FloatingPointError(f"the loss is {total}")
        return total

    @torch.no_grad()
    def validate(self, model):
        """Mean loss in nats over the same held-out blocks each time; no random number is drawn."""
        config = self.config
        count = min(config.val_blocks, self.validation.n_blocks(config.block_size))
        size = min(config.batch_size, count)
        batches = range(count // size)
        share = batches[rank()::world()][: max(1, len(batches) // world())] or batches[:1]  # as many on every rank
        total = torch.tensor(0.0, dtype=torch.float64)
        with self.progress.pause(), torch.compiler.set_stance("force_eager"):
            for index in share:
                idx = self.validation.batch(index, size, config.block_size).to(self.machine.device)
                with self.machine.autocast():
                    total += float(model(idx, idx)) / len(share)
            if hasattr(model, "reshard"):
                model.reshard()  # FSDP keeps embedding and head gathered behind a forward pass, for the backward pass
        average(total)
        return float(total)

    def stopping(self):
        """Whether a signal has asked this run to stop; all ranks agree, so that they leave behind the same step."""
        return bool(agreed(torch.tensor(float(self.stop))))

    def save(self, params, masks, optimizer, step):
        """Write the checkpoint: weights, optimizer state, mask. All of it is secret."""
        if not holds_part(params):
            return
        with self.progress.pause():
            tensors = {f"model.{name}": p for name, p in params.items()} | optimizer.state()
            tensors |= {f"mask.{name}": bits for name, bits in pack_mask(masks or {}).items()}
            state = {"step": str(step), "log_bytes": str(self.progress.file.tell())}
            save_safetensors(self.private / "checkpoint.safetensors", tensors, state, mode=0o600,
                             write=rank() == 0)

    def leave(self, what):
        print(f"\nstopped: {what}; go on with: {launcher()} pmp.py --resume {self.out}", flush=True)
        leave_ranks(130)
        raise SystemExit(130)


# -----------------------------------------------------------------------------
# more than one device: torchrun starts this program once for each, as ranks 0, 1, …; without it there is one rank and
# every function here does nothing. Data parallel: every rank holds the whole model and takes its share of an update's
# micro-batches. --shard: every rank holds some rows of each parameter, gradient, moment and mask besides.


def join_ranks():
    """Become one of torchrun's ranks. Only rank 0 prints; what goes wrong goes to stderr on any of them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    # A dead rank closes its connections, which the others notice at once. The limit is for one that hangs; it leaves
    # time to write a large checkpoint, for which the others wait.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def wait_for_ranks():
    """Return when all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()


def leave_ranks(code=0):
    """End this process if it is one of several ranks, when all of them have come here.

    Python's own exit is passed over: there gloo's threads abort about one process in fifty ("terminate called without
    an active exception", torch 2.13), and torchrun would report a finished run as a failure.
    """
    if dist.is_initialized():
        wait_for_ranks()
        sys.stdout.flush()
        os._exit(code)


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def launcher():
    return "python" if world() == 1 else f"torchrun --standalone --nproc-per-node={world()}"


def lost_rank(error):
    """Whether a RuntimeError says that another rank is gone; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def from_first(function, *args):
    """What function(*args) returns on rank 0, on every rank. If it raises there, the others leave without a word."""
    box = [False, None]
    try:
        if rank() == 0:
            box = [True, function(*args)]
    finally:
        if world() > 1:
            dist.broadcast_object_list(box)
    if not box[0]:
        raise SystemExit(2)
    return box[1]


def average(*tensors):
    """Replace tensors by their mean over ranks."""
    if world() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        torch._foreach_div_(tensors, world())


def agreed(flag):
    """The largest of the ranks' flags (a tensor)."""
    if world() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag


def total(counts, tensors):
    """The sum of the ranks' counts (a tensor) over the entries that each holds of the {name: tensor} `tensors`."""
    if sharded(next(iter(tensors.values()))):
        dist.all_reduce(counts)
    return counts


def tie_shares(scores, threshold, ties):
    """{name: how many of the first `ties` entries at the threshold this rank holds}; {} where scores are not sharded.

    First is meant as on one device: by tensor, then by row, hence by rank.
    """
    if not sharded(next(iter(scores.values()))):
        return {}
    mine = torch.stack([sum((bit_pattern(x) == threshold).sum() for (x,) in pieces(score))
                        for score in scores.values()])
    each = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(each, mine)
    held = torch.stack(each, dim=1)  # (tensors, ranks)
    before = held.flatten().cumsum(0).view_as(held) - held
    return dict(zip(scores, (ties - before).clamp(min=0).minimum(held)[:, rank()].tolist()))


def holds_part(params):
    """Whether this rank has a part in writing the run's files: rank 0 writes, and gathers sharded tensors from all."""
    return rank() == 0 or sharded(next(iter(params.values())))


def build_sharded(shape, device):
    """The model of a config with every parameter split by rows over the ranks; at no time does one hold all of it.

    FSDP gathers a block when it is needed and averages its gradient behind each micro-batch, for a sum of gradients
    over micro-batches would have to be kept whole on every rank.
    """
    from torch.distributed.fsdp import fully_shard  # takes as long to import as torch

    model = build(shape, device="meta")
    mesh = dist.init_device_mesh(device.type, (world(),))
    for part in (*model.blocks(), model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device=device)
    model.tie()
    return model


def memory_per_rank(shape, ranks=1, masked=True):
    """{what: bytes} that each rank keeps to train a model `shape` (GPT2Config or LlamaConfig) in fp32 with AdamW.

    Needs no memory itself: try it on a shape of your own. With ranks > 1 as under --shard: rows are dealt out evenly,
    and `gathered` estimates what FSDP keeps whole for a moment: the weights and gradients of the root (embedding and
    head), and a copy of those gradients or the weights of two blocks and the gradients of one. On top come activations
    and, in stage I, the next candidate mask (1 byte a parameter) and with --score mean the mean (4 bytes).
    """
    model = build(shape, device="meta")
    share = sum(-(-len(p) // ranks) * (p.numel() // len(p)) for p in model.parameters())
    block = sum(p.numel() for p in model.blocks()[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - block * len(model.blocks())
    return {"weights": 4 * share, "gradients": 4 * share, "moments": 8 * share, "mask": share if masked else 0,
            "gathered": 4 * (2 * root + max(root, 3 * block)) if ranks > 1 else 0}


# -----------------------------------------------------------------------------
# the run


def start(config):
    """A new run: refuse a used folder, draw the secret of theta(0), and write both down before anything else."""
    run = Run(config, from_first(new_secret, config))
    if rank() == 0:
        run.private.mkdir(parents=True, exist_ok=True)
        run.private.chmod(0o700)
        content = {"config": asdict(config), "init_secret": run.secret.hex(), "tokenizer": run.tokenizer.fingerprint}
        with atomic(run.private / "run.json", mode=0o600) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")
    return run


def new_secret(config):
    """The secret of theta(0) of a new run. Raises UserError where its folder is in use."""
    out = Path(config.out)
    private = out / "private"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if (private / "run.json").exists():
        raise UserError(f"{out} already holds a run: continue it with --resume {out}, or name another --out")
    if out.is_dir() and any(path.name != "private" for path in out.iterdir()):
        raise UserError(f"{out} is not empty: name another --out")
    if config.init_seed is None:
        return secrets.token_bytes(32)
    print("note: with --init-seed anyone who guesses the number can redraw the initial weights and read the mask off "
          "the release", flush=True)
    return f"init-seed {config.init_seed}".encode()


def resume(out, machine_flags):
    """The Run that `out` holds, with its own settings."""
    path = Path(out) / "private" / "run.json"
    try:
        content = from_first(lambda: json.loads(path.read_bytes()))
        config = Config(**{**content["config"], "out": str(out), **machine_flags})
        run = Run(config, bytes.fromhex(content["init_secret"]))
    except OSError:
        raise UserError(f"{out} holds no run to resume (no {path}): start one with --out {out}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: restore it from a copy, or start a new run") from None
    if run.tokenizer.fingerprint != content["tokenizer"]:
        raise UserError(f"the text or tokenizer of {out} has changed since the run began: put the old one back")
    return run


def train(run):
    """Stages I to III, from theta(0) or from the run's checkpoint. Returns the released model."""
    config, machine = run.config, run.machine
    checkpoint = run.private / "checkpoint.safetensors"
    saved, state = load_safetensors(checkpoint) if from_first(checkpoint.exists) else ({}, {"log_bytes": "0"})

    log = run.out / "log.jsonl" if rank() == 0 else Path(os.devnull)
    if rank() == 0:
        log.touch(mode=0o600)
        os.truncate(log, min(log.stat().st_size, int(state["log_bytes"])))  # steps behind the checkpoint come again
    run.progress = Progress(log, run.tokens_per_step)
    say = run.progress.say

    shape = replace(PRESETS[config.preset], vocab_size=run.tokenizer.size)
    shard = config.shard and world() > 1
    model = build_sharded(shape, machine.device) if shard else build(shape, machine.device)
    model.checkpointing = config.checkpointing
    params = dict(model.named_parameters())
    d = sum(p.numel() for p in params.values())
    ranks = f", {world()} ranks{' hold a share each' if shard else ''}" if world() > 1 else ""
    say(f"{config.preset}: {d:,} parameters, {run.tokens_per_step:,} tokens an update, "
        f"{machine.device} {machine.dtype}{ranks}")
    if machine.wants_compile(config.compile, config.steps * run.tokens_per_step):
        initialise(model, run.secret)
        machine.compile(model, run.micro_batch(0), say)

    if saved:
        step = int(state["step"])
        with torch.no_grad():
            for name, p in params.items():
                local(p).copy_(rows(saved[f"model.{name}"], p))
        masks = unpack_mask({name: saved[f"mask.{name}"] for name in params}, params) if config.rho < 1 else None
        say(f"going on after update {step}")
    else:
        step, masks = 0, None
        initialise(model, run.secret)
        if config.rho < 1:
            masks = find_ticket(run, model, params)
            initialise(model, run.secret)  # back to theta(0)
            say("ticket density: " + "  ".join(f"{kind} {share:.2f}" for kind, share in density_by_kind(masks).items()))

    optimizer = MaskedAdamW(params, masks, config.weight_decay)
    if saved:
        optimizer.load_state(saved, step)
        del saved
    else:
        run.save(params, masks, optimizer, step)
    pretrain(run, model, params, masks, step, optimizer)
    release(run, model, params, masks)
    return model


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one sentence here, like all others."""

    def error(self, message):
        raise UserError(f"{message}; -h lists the flags")


def parse(argv):
    """(Config, None) for a new run, or (machine flags, OUT) for --resume OUT."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28))
    for f in fields(Config):
        default = f"{f.default}" if f.name not in TINY else f"{TINY[f.name]} for {', '.join(SMALL)}, else {f.default}"
        help = f.metadata["help"] + (f" [{default}]" if f.default is not None and f.name != "cache" else "")
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
            "type": int if f.default is None else type(f.default), "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, default=argparse.SUPPRESS,
                            help=help.replace("%", "%%"))
    parser.add_argument("--resume", metavar="OUT", help="go on with the run in OUT; it keeps its settings")
    given = vars(parser.parse_args(argv))
    out = given.pop("resume")
    if out is not None:
        if unwanted := [name for name in given if name not in MACHINE]:
            raise UserError(f"--resume keeps the settings of the run: leave out --{unwanted[0].replace('_', '-')}")
        return given, out
    config = Config(**{**(TINY if given.get("preset", Config.preset) in SMALL else {}), **given})
    check(config)
    return config, None


def main(argv=None):
    join_ranks()
    config, out = from_first(parse, argv)
    run = start(config) if out is None else resume(out, config)

    def stop(*_):
        run.stop = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        model = train(run)
    except FloatingPointError as error:
        where = f"after step {run.progress.last} of stage {run.progress.stage}"
        raise SystemExit(f"\nstopped {where if run.progress.stage else 'in the first step'}: {error}; the last good "
                         f"checkpoint stays in {run.private}; start a new run with a lower --lr") from None
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        raise SystemExit(f"\nstopped: rank {rank()} has lost another rank, which died or was killed; go on from the "
                         f"last checkpoint with: {launcher()} pmp.py --resume {run.out}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"\nreleased {run.out}/release; keep {run.private} to yourself\n")
    start_token = torch.tensor([[run.tokenizer.eos]], device=run.machine.device)
    text = model.generate(start_token, 120, eos=run.tokenizer.eos, seed=run.config.seed)[0, 1:].tolist()
    print(run.tokenizer.decode(text))
    leave_ranks()


def command_line(main):
    """Run main(): what a user can mend is one sentence and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"error: cannot write {error.filename or 'a file'} ({error.strerror}): free or choose another place",
              file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130)


if __name__ == "__main__":
    command_line(main)
