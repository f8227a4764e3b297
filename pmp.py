"""Private Mask Pre-Training (PMP): open weights that outsiders gain little from fine-tuning.

    python pmp.py --rho 0.7

This file is section 2 of the paper (arXiv:2602.00446), from top to bottom; equation numbers are the paper's. First the
settings, and `pmp`, the whole of it. Stage I finds the ticket, stage II trains the ticket alone, stage III releases the
weights without the mask. Last comes what the stages share, and the command line.

A mask is a dict {parameter name: bool tensor}: True is the ticket, False the complement.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for Ctrl-C alone: it ends the slow imports without a word

import math
import secrets
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.pack import BUFFER, CACHE, prepare
from model import KINDS, GPT2Config, LlamaConfig, build, initial_value, initialise, parts_by_kind, secret_generator
from runtime.console import Parser, Progress, check_fields, command_line, flag, flag_name, require
from runtime.files import Stopped, UserError, write_json
from runtime.folder import Folder, StopRequest
from runtime.huggingface import save_folder
from runtime.machine import Machine
# Without --shard whole(x) is x, count(mask) the number of True, split_like(p, x) is x on p's device; in one process
# from_first(f, ...) is f(...).
from runtime.parallel import (assign, count, first_then_others, from_first, join_ranks, launcher, leave_ranks,
                              memory_per_rank, place, share, split_like, whole, world)
from runtime.safetensors import fingerprint, load_safetensors, raw_bytes, save_safetensors
from runtime.tensors import bits, checksum, multiply_, shrink_, top_k
from runtime.training import Reader, gradient, mean_loss, timed

# -----------------------------------------------------------------------------
# settings


@dataclass(frozen=True)
class Preset:
    """A model, the tokenizer of its text, and where its settings differ from the paper's, which are Config's."""

    shape: GPT2Config | LlamaConfig  # the tokenizer decides its vocabulary
    tokenizer: str = "gpt2"  # GPT-2's, or "bpe": 4,096 tokens trained on the text itself
    defaults: dict = field(default_factory=dict)


LAPTOP = {"data": "prose", "eb_steps": 50, "steps": 1000, "warmup": 60, "lr": 1.5e-3, "grad_accum": 1,
          "val_every": 200, "val_blocks": 64, "save_every": 200}
MINI = {"vocab_size": 4096, "max_position_embeddings": 1024, "hidden_size": 192, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
PRESETS = {
    "tiny": Preset(LlamaConfig(  # a few minutes on a laptop
        vocab_size=4096, max_position_embeddings=1024, hidden_size=256, intermediate_size=704,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2), "bpe", LAPTOP),
    # a third of tiny, for sweeps of many models on a laptop; its head is tied to its embedding
    "mini": Preset(LlamaConfig(**MINI, tie_word_embeddings=True), "bpe", LAPTOP),
    "mini-untied": Preset(LlamaConfig(**MINI), "bpe", LAPTOP),
    "mini-gpt2": Preset(GPT2Config(vocab_size=4096, n_positions=256, n_embd=192, n_layer=4, n_head=4), "bpe", LAPTOP),
    "gpt2": Preset(GPT2Config()),
    "tinyllama": Preset(LlamaConfig()),  # the paper's 1.1B shape (section 4.1), with GPT-2's vocabulary
}


@dataclass
class Config:
    """Everything that decides what a run computes. Each field is a flag.

    Where section 4.1 or appendix A name a number it is the default. A preset may have its own: `tiny` does.
    """

    rho: float = flag(0.7, "share of all parameters that the ticket keeps, in (0, 1]; 1.0 trains without PMP")
    preset: str = flag("tiny", "model and its defaults", tuple(PRESETS))
    data: str = flag("slimpajama", "prose, slimpajama, or a .txt or .jsonl file, also .gz or .xz")
    out: str = flag("out", "folder of the run: OUT/release is for publication, OUT/private stays with you")
    mask: str = flag("earlybird", "how the ticket is found; random is the paper's ablation", ("earlybird", "random"))
    score: str = flag("batch", "what EarlyBird ranks: |gradient| of the step's mini-batch (eq. 2), its running mean, "
                      "|weight|, or |gradient * weight|", lambda: tuple(SCORES))
    eb_steps: int = flag(500, "EarlyBird warm-up steps at most (t_EB)")
    eb_iou: float = flag(0.99, "IoU of consecutive masks that counts as stable")
    eb_patience: int = flag(5, "consecutive stable steps that end the warm-up")
    steps: int = flag(20000, "optimizer updates of stage II")
    warmup: int = flag(2000, "updates of learning-rate warm-up; unless given, at most a tenth of --steps")
    lr: float = flag(2e-5, "peak learning rate; cosine decay to 0")
    weight_decay: float = flag(0.1, "AdamW weight decay, on the ticket's matrices only")
    clip: float = flag(1.0, "largest global norm of the masked gradient")
    batch_size: int = flag(4, "sequences in a micro-batch")
    grad_accum: int = flag(8, "micro-batches in an update")
    block_size: int = flag(256, "tokens in a sequence")
    val_every: int = flag(500, "updates between validations")
    val_blocks: int = flag(512, "held-out sequences in a validation, at most")
    save_every: int = flag(500, "updates between checkpoints")
    shuffle_buffer: int = flag(BUFFER, "documents that are shuffled together")
    cache: str = flag(str(CACHE), "folder that keeps prepared text")
    seed: int = flag(42, "decides the order of the data; theta(0) and a random mask come from a secret")
    init_seed: int = flag(None, "draw theta(0) from this number: then anyone can read the mask off the release")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    dtype: str = flag("auto", "precision of matrix products; the weights stay fp32", ("auto", "fp32", "bf16"))
    compile: str = flag("auto", "torch.compile; auto uses it on a GPU, and on a CPU for runs of over 0.5M tokens",
                        ("auto", "on", "off"))
    checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, a third more time")
    shard: bool = flag(False, "split weights, gradients, optimizer state and mask over torchrun's processes")

    @property
    def sequences(self):
        """Sequences in a mini-batch, which is what one update sees."""
        return self.batch_size * self.grad_accum


# flags that say where and how a run computes, not what: --resume takes new ones
MACHINE = ("cache", "device", "compile", "checkpointing", "shard")

# -----------------------------------------------------------------------------
# section 2 as a whole


def pmp(run, make_optimizer=None):
    """Section 2: from theta(0), or from the run's checkpoint, to the release. run: a Run, below.

    make_optimizer(params, masks, weight_decay): MaskedAdamW, or something with its methods.
    """
    params = dict(run.model.named_parameters())
    initialise(run.model, run.secret)  # theta(0)
    run.compile()
    saved, masks, step = run.load()  # of a new run: nothing; else the checkpoint's weights replace theta(0)
    if not saved and run.config.rho < 1:
        masks = find_ticket(run)  # stage I
        run.keep_density(masks)
        initialise(run.model, run.secret)  # back to theta(0)
    optimizer = (make_optimizer or MaskedAdamW)(params, masks, run.config.weight_decay)
    if saved:
        optimizer.load_state(saved)
    else:
        run.save(masks, optimizer, step)  # so that a resumed run need not repeat stage I
    pretrain(run, masks, optimizer, step)  # stage II
    release(run, masks)  # stage III


# -----------------------------------------------------------------------------
# stage I: private early-bird mask discovery (section 2.1)

# What the top-k ranks, for one parameter theta at warm-up step t = 1, 2, …: g is its gradient, last the score of step
# t - 1 (0.0 at first). The sign of a score does not count.
SCORES = {
    "batch": lambda theta, g, last, t: g,  # eq. 2
    "mean": lambda theta, g, last, t: last + (g.abs() - last) / t,
    "magnitude": lambda theta, g, last, t: theta,
    "snip": lambda theta, g, last, t: g * theta,
}


def topk_mask(scores, k):
    """Eq. 2: {name: bool mask} with exactly k True in all, at the k largest |score| over all parameters together.

    scores: {name: fp32 tensor}. Ties go to the first in the order of the dict, then of the flat index. It is this,

        flat = torch.cat([score.abs().flatten() for score in scores.values()])
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[flat.sort(descending=True, stable=True).indices[:k]] = True

    without the sort and, but on a single GPU, without a copy of all scores.
    """
    return top_k(scores, k)


def random_mask(params, k, secret):
    """The paper's ablation: exactly k entries, drawn from the run's secret: a public seed gives a public mask."""
    def draw(name, p):
        uniform = secret_generator(secret, "mask/" + name).random(tuple(p.shape), dtype=np.float32)
        return split_like(p, torch.from_numpy(uniform))

    return topk_mask({name: draw(name, p) for name, p in params.items()}, k)


def iou(a, b):
    """Eq. 3: intersection over union, |a & b| / |a | b|. Of two random masks it is rho / (2 - rho)."""
    both = sum(count(a[name] & b[name]) for name in a)
    either = sum(count(a[name] | b[name]) for name in a)
    return both / either


class EarlyBird:
    """Eq. 4: the first mask whose IoU with the one before has stayed >= `threshold` for `patience` steps in a row.

    Section 2.1 says "several successive steps", 4.1 an IoU of 0.99 for 5 steps. The mask at the end of them is taken.
    """

    def __init__(self, threshold, patience):
        self.threshold, self.patience = threshold, patience
        self.mask, self.streak = None, 0

    def see(self, mask):
        """Take the candidate of the next step. Returns its IoU with the last one (None for the first)."""
        overlap = None if self.mask is None else iou(mask, self.mask)
        self.streak = self.streak + 1 if overlap is not None and overlap >= self.threshold else 0
        self.mask = mask
        return overlap

    @property
    def stable(self):
        return self.streak >= self.patience


def find_ticket(run):
    """Stage I: warm up the dense model from theta(0) for at most t_EB steps, and choose the ticket on the way.

    run: a Run, below; run.gradient(t) leaves the gradient of mini-batch t in the parameters. The warm-up reads the
    first mini-batches of the training data, and leaves a warmed-up model: the caller goes back to theta(0). Returns the
    mask. A random mask needs no warm-up.
    """
    config = run.config
    params = dict(run.model.named_parameters())
    k = math.floor(config.rho * sum(p.numel() for p in params.values()))  # eq. 1
    if config.mask == "random":
        return random_mask(params, k, run.secret)
    bird = EarlyBird(config.eb_iou, config.eb_patience)
    optimizer = MaskedAdamW(params, None, config.weight_decay)  # no mask yet: plain AdamW
    score, scores = SCORES[config.score], {}
    chance = config.rho / (2 - config.rho)
    for step in range(config.eb_steps):
        loss = run.gradient(step)
        for name, p in params.items():
            scores[name] = score(p.detach(), p.grad, scores.get(name, 0.0), step + 1)
        overlap = bird.see(topk_mask(scores, k))  # eq. 2 and 3
        lr = config.lr * (step + 1) / config.eb_steps  # rises to the last step; not stage II's schedule
        norm = optimizer.step(lr, config.clip)
        numbers = {} if overlap is None else {"iou": overlap, "iou_chance": chance}
        run.progress.step("I", step + 1, config.eb_steps, loss=loss, **numbers, lr=lr, grad_norm=norm)
        if bird.stable:  # eq. 4
            run.progress.say(f"stage I: the mask is stable (IoU >= {config.eb_iou} for {config.eb_patience} steps) "
                             f"after {step + 1} steps; two random masks would share {chance:.2f}")
            break
        if run.stop:
            run.leave("stage I keeps no checkpoint, it will begin again")
    else:
        last = "none" if overlap is None else f"{overlap:.3f}"
        run.progress.say(f"stage I: no stable mask within {config.eb_steps} steps (last IoU {last}, wanted "
                         f"{config.eb_iou}, chance {chance:.2f}): the ticket is the last mask")
    return bird.mask


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
    def step(self, lr, clip=math.inf):
        """Update by the gradients, then drop them. Returns the global norm of the masked gradient before clipping.

        Raises FloatingPointError, with nothing changed, where that norm is not finite.
        """
        for name, mask in self.masks.items():
            multiply_(self.params[name].grad, mask)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.params.values(), clip)).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        for name, p in self.params.items():
            if p.ndim >= 2 and self.weight_decay:
                shrink_(p, self.masks.get(name), lr * self.weight_decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def state(self):
        """{"optimizer.KEY.NAME": tensor} after the first step."""
        return {f"optimizer.{key}.{name}": value for name, p in self.params.items()
                for key, value in self.optimizer.state.get(p, {}).items()}

    def load_state(self, tensors):
        """Take back what state() gave."""
        def onto(p, value):  # a copy, for `tensors` may be views of a file
            value = value.to(p.device, copy=True)
            return split_like(p, value) if value.ndim else value  # "step" is a single number

        for name, p in self.params.items():
            end = "." + name
            found = {key.removeprefix("optimizer.").removesuffix(end): value for key, value in tensors.items()
                     if key.startswith("optimizer.") and key.endswith(end)}
            self.optimizer.state[p] = {key: onto(p, value) for key, value in found.items()}


def learning_rate(step, config):
    """Linear warm-up, then cosine decay to 0 at config.steps; step counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def pretrain(run, masks, optimizer, step):
    """Stage II from update `step` to the end; masks None is dense training."""
    config = run.config
    frozen = Complement(run.model, masks)
    while step < config.steps:
        loss = run.gradient(step)
        lr = learning_rate(step, config)
        norm = optimizer.step(lr, config.clip)  # eq. 5
        step += 1
        numbers = {}
        if step % config.val_every == 0 or step == config.steps:
            numbers["val_loss"] = run.validate()
        if step == 1 or "val_loss" in numbers:
            frozen.check(step)
        run.progress.step("II", step, config.steps, loss=loss, **numbers, lr=lr, grad_norm=norm)
        stop = bool(run.stop)
        if step % config.save_every == 0 or step == config.steps or stop:
            run.save(masks, optimizer, step)
        if stop and step < config.steps:
            run.leave(f"saved after update {step}")


COMPLEMENT_MOVES = False  # a fork that moves the complement on purpose says True here


class Complement:
    """An early alarm, by a checksum of each parameter, when the complement moves. The proof is in `release`."""

    def __init__(self, model, masks):
        self.params = {name: p for name, p in model.named_parameters() if masks}
        self.masks = masks
        self.before = self.checksums()

    def checksums(self):
        return {name: checksum(p, self.masks[name]) for name, p in self.params.items()}

    def check(self, step):
        """Raise UserError that names a parameter whose complement has moved."""
        now = self.checksums()
        if not COMPLEMENT_MOVES and (moved := [name for name in now if now[name] != self.before[name]]):
            raise UserError(f"the complement of {moved[0]} has moved by update {step}, where eq. 5 keeps it at "
                            "theta(0): mask what your optimizer does, or set COMPLEMENT_MOVES = True in pmp.py")


# -----------------------------------------------------------------------------
# stage III: release without the mask (section 2.3)
#
# What the exact bits of a release could tell an attacker, and what is done about it:
# - A frozen weight is a draw that was rounded once, so its bits have no pattern: see initial_value in model.py.
# - A zero step must change no bit, so theta(0) holds no -0.0, which adding 0 turns into 0.0.
# - Norm gains and biases start as constants. One that is still exactly 1 or 0 was frozen: this is not hidden.
# - Weight decay multiplies the ticket alone, and a rounded product could leave gaps between its values. Adam's step
#   follows at once and closes them, but for an entry that never has a gradient; a ticket has few of those.
# - A tied head is one tensor with one mask, so no copy of it can disagree.
# - The order of the tensors, the header and the other files are the same for every mask, and without one. The
#   checksum in the header is a function of the published bytes.
# - A model that an authorised user fine-tuned differs from the release in the ticket alone. In any precision, whoever
#   publishes it publishes the mask.


def complement_moved(model, masks, secret):
    """How many entries outside the ticket differ, in any bit, from theta(0): 0, or something is broken."""
    moved = 0
    for name, p in model.named_parameters():
        theta_0 = split_like(p, initial_value(model, name, p.shape, secret))
        moved += count((bits(p) != bits(theta_0)) & ~masks[name])
    return moved


def release(run, masks):
    """Publish the dense weights, the config and the tokenizer; keep the mask."""
    params = dict(run.model.named_parameters())
    if masks:
        moved = complement_moved(run.model, masks, run.secret)
        if moved and not COMPLEMENT_MOVES:
            raise UserError(f"{moved} entries of the complement have left theta(0): nothing was released; see "
                            "COMPLEMENT_MOVES in pmp.py")
        save_mask(run.folder.private / "mask.safetensors", masks, params)
    save_folder(run.folder.release, run.model, f"A language model ({run.config.preset})", run.facts())
    from_first(run.tokenizer.save, run.folder.release, run.model.max_positions)


# -----------------------------------------------------------------------------
# the mask's file, and its shape: both stay private


def pack_mask(masks):
    """{name: uint8}: the masks at one bit a parameter, in flat order, most significant bit first."""
    return {name: torch.from_numpy(np.packbits(raw_bytes(mask))) for name, mask in masks.items()}


def unpack_mask(packed, params):
    """The mask of pack_mask, shaped like params. Raises UserError where they do not fit."""
    unfit = packed.keys() ^ params.keys()
    unfit |= {name for name in packed.keys() & params.keys() if packed[name].dtype != torch.uint8
              or packed[name].shape != ((params[name].numel() + 7) // 8,)}
    if unfit:
        raise UserError(f"the mask does not fit the model at {min(unfit)}: it was made for another model")
    masks = {}
    for name, p in params.items():
        flags = np.unpackbits(packed[name].numpy(), count=p.numel())
        masks[name] = split_like(p, torch.from_numpy(flags).view(torch.bool).view(p.shape))
    return masks


def save_mask(path, masks, params):
    """Write the mask, for the owner alone, bound by its sha256 to the release of `params`."""
    save_safetensors(path, pack_mask(masks), {"weights_sha256": fingerprint(params)}, mode=0o600)


def load_mask(path, params):
    """The mask of save_mask. Raises UserError for a damaged file or the mask of another release."""
    packed, metadata = load_safetensors(path)
    if metadata.get("weights_sha256") != fingerprint(params):
        raise UserError(f"{path} was made for another release: use the mask that was written with these weights")
    return unpack_mask(packed, params)


def density_by_kind(masks):
    """{kind of layer: share of its parameters in the ticket}. Private: it tells an attacker where to look."""
    kept, size = {}, {}
    for name, mask in masks.items():
        for kind, part in parts_by_kind(name, whole(mask)):
            kept[kind] = kept.get(kind, 0) + int(part.sum())
            size[kind] = size.get(kind, 0) + part.numel()
    return {kind: kept[kind] / size[kind] for kind in KINDS if kind in size}


# -----------------------------------------------------------------------------
# what the stages share


def identity(config, secret, tokenizer):
    """What a run's checkpoint belongs to: {name: JSON value} of all that decides its numbers."""
    settings = {name: value for name, value in asdict(config).items() if name not in (*MACHINE, "out")}
    return settings | {"secret": secret.hex(), "tokenizer": tokenizer}


class Run:
    """One run: its settings and secret, its text and model, its folder and machine."""

    def __init__(self, config, secret, folder):
        """secret: bytes that theta(0) is drawn from; folder: Folder."""
        self.config, self.secret, self.folder = config, secret, folder
        self.stop = False  # or a StopRequest, true when the user asks
        self.machine = Machine(config.device, config.dtype)
        from_first(share, config.sequences)  # what cannot be shared fails once, and before anything is prepared
        tokenizer = PRESETS[config.preset].tokenizer
        self.tokens = config.sequences * config.block_size  # in an update
        self.tokenizer, train, validation = first_then_others(lambda: prepare(
            config.data, tokenizer, max(config.steps, config.eb_steps) * self.tokens, seed=config.seed,
            cache=config.cache, shuffle_buffer=config.shuffle_buffer, say=partial(print, flush=True)))
        self.train, self.validation = (Reader(text, config.batch_size, config.block_size, self.machine.device)
                                       for text in (train, validation))
        train.read(0, config.sequences, config.block_size)  # too small a text fails before anything is written
        self.identity = identity(config, secret, self.tokenizer.fingerprint)

    def begin(self):
        """Build the model, its weights still empty, and open the log."""
        config = self.config
        saved, state = self.folder.load(self.identity)
        shape = replace(PRESETS[config.preset].shape, vocab_size=self.tokenizer.size)
        self.model, layout = place(partial(build, shape), self.machine.device, config.shard)
        self.model.checkpointing = config.checkpointing
        for name, p in self.model.named_parameters():
            if saved and getattr(saved.get(f"model.{name}"), "shape", None) != p.shape:
                raise UserError(f"the checkpoint in {self.folder.private} has no {name} of this model: restore it from "
                                "a copy, or start a new run with another --out")
        self.progress = Progress(self.folder.open_log(state.get("log_bytes", 0)), self.tokens)
        d = sum(p.numel() for p in self.model.parameters())
        self.progress.say(f"{config.preset}: {d:,} parameters, {self.tokens:,} tokens an update, {self.machine.device} "
                          f"{self.machine.dtype}{layout}")

    def compile(self):
        """torch.compile, where the settings and the machine want it."""
        if self.machine.wants_compile(self.config.compile, self.config.steps * self.tokens):
            self.machine.compile(self.model, self.train.micro_batches(range(self.config.sequences))[0],
                                 self.progress.say)

    def gradient(self, step):
        """Leave the gradient of mini-batch number `step` in the parameters; returns its mean loss in nats.

        Which text that is depends on the number alone, so that a resumed run needs no state.
        """
        size = self.config.sequences
        mini_batch = self.train.micro_batches(range(step * size, (step + 1) * size))
        return gradient(self.model, mini_batch, self.machine)

    def validate(self):
        """Mean loss in nats over the same held-out sequences each time."""
        with self.progress.pause():
            return mean_loss(self.model, self.validation.held_out(self.config.val_blocks), self.machine)

    # ---- the folder ----

    def facts(self):
        """What the model card says. It must not depend on rho or the mask."""
        config = self.config
        return [f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {self.model.model_type}, "
                f"{self.model.max_positions:,} positions",
                f"byte-level BPE of {self.tokenizer.size:,} tokens",
                f"trained on {Path(config.data).name}, {config.steps:,} updates of {config.sequences} sequences of "
                f"{config.block_size} tokens"]

    def save(self, masks, optimizer, step):
        """Write the checkpoint: weights, optimizer state, mask. All of it is secret."""
        with self.progress.pause():
            tensors = {f"model.{name}": p for name, p in self.model.named_parameters()} | optimizer.state()
            tensors |= {f"mask.{name}": packed for name, packed in pack_mask(masks or {}).items()}
            state = {"step": step, "log_bytes": self.progress.log_bytes()}
            self.folder.save(tensors, state, self.identity)

    def load(self):
        """Put the checkpoint's weights into the model. Returns (its tensors, mask, step); ({}, None, 0) without one."""
        saved, state = self.folder.load(self.identity)
        if not saved:
            return {}, None, 0
        params = dict(self.model.named_parameters())
        for name, p in params.items():
            assign(p, saved[f"model.{name}"])
        packed = {name: saved[f"mask.{name}"] for name in params if f"mask.{name}" in saved}
        last = state["step"] == self.config.steps
        self.progress.say("all updates are done: the release is written again" if last else
                          f"going on after update {state['step']}")
        return saved, unpack_mask(packed, params) if packed else None, state["step"]

    def keep_density(self, masks):
        """Write down the ticket's density. It goes to the private folder, never to the screen or the log."""
        path = self.folder.private / "density.json"
        from_first(write_json, path, density_by_kind(masks), 0o600)
        self.progress.say(f"the ticket's density by kind of layer is in {path}")

    def leave(self, what):
        print(f"\nstopped: {what}; go on with: {launcher()} pmp.py --resume {self.folder.out}", flush=True)
        leave_ranks(130)
        raise SystemExit(130)


# -----------------------------------------------------------------------------
# the command line


def check(config):
    """Raise UserError for settings that no run can have."""
    check_fields(config)
    for name in ("eb_steps", "eb_patience", "steps", "batch_size", "grad_accum", "val_every", "val_blocks",
                 "save_every", "shuffle_buffer"):
        most = 10**6 if name in ("batch_size", "grad_accum") else 10**9
        require(1 <= getattr(config, name) <= most,
                f"{flag_name(name)} {getattr(config, name)} is below 1 or above {most}")
    for name in ("seed", "init_seed"):
        number = getattr(config, name) or 0
        require(0 <= number < 2**63, f"{flag_name(name)} {number} is outside 0 to 2**63 - 1")
    model = build(PRESETS[config.preset].shape, device="meta")
    d = sum(p.numel() for p in model.parameters())
    require(0 < config.rho <= 1, f"--rho {config.rho} is outside (0, 1]: it is the share of parameters in the ticket")
    require(config.rho * d >= 1, f"--rho {config.rho} leaves no parameter in the ticket: raise it")
    require(0 <= config.warmup <= config.steps,
            f"--warmup {config.warmup} is longer than the run: it must be 0 to --steps ({config.steps})")
    require(0 < config.lr < math.inf, f"--lr {config.lr} is not a positive number")
    require(0 <= config.eb_iou <= 1, f"--eb-iou {config.eb_iou} is outside [0, 1]")
    require(0 <= config.weight_decay < 1 / config.lr,
            f"--weight-decay {config.weight_decay} must be at least 0 and below 1/lr")
    require(0 < config.clip < math.inf,
            f"--clip {config.clip} is not a positive number: use a large one for no clipping")
    require(2 <= config.block_size <= model.max_positions,
            f"--block-size {config.block_size} is outside 2 to the {model.max_positions} positions of "
            f"--preset {config.preset}")


def plan(config):
    """Print what a run would take, at the speed of this machine. Writes nothing."""
    machine = Machine(config.device, config.dtype)
    shape = PRESETS[config.preset].shape
    model = build(shape, device="meta")
    d = sum(p.numel() for p in model.parameters())
    warmed_up = config.rho < 1 and config.mask == "earlybird"
    updates = config.steps + (config.eb_steps if warmed_up else 0)
    tokens = updates * config.sequences * config.block_size
    # stage I keeps the scores of its last step while it computes the next gradient; a single GPU ranks a copy of them
    scores = warmed_up * (6 if machine.device.type == "cuda" and not config.shard else 4)
    memory = memory_per_rank(model, world() if config.shard else 1, mask=int(config.rho < 1), scores=scores)
    print(f"{config.preset}: {d:,} parameters; {updates:,} updates of {config.sequences} x {config.block_size} tokens")
    print(f"tokens: {tokens:,} ({tokens / d:.2f} a parameter)")
    print(f"FLOPs: {tokens * model.flops_per_token(config.block_size):.2e}")
    print(f"memory of each process, without activations: {sum(memory.values()) / 2**30:.2f} GiB ("
          + ", ".join(f"{what} {size / 2**30:.2f}" for what, size in memory.items() if size) + ")")
    checkpoint = 12 * d + (d / 8 if config.rho < 1 else 0)
    text = 2 * max(config.steps, config.eb_steps) * config.sequences * config.block_size
    print(f"disk: about {(2 * checkpoint + text) / 2**30:.3g} GiB, while a new checkpoint is written beside the old "
          f"(a checkpoint {checkpoint / 2**30:.3g}, text {text / 2**30:.3g}, the release {4 * d / 2**30:.3g})")
    model = build(shape, machine.device)
    initialise(model, b"plan")
    idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.long, device=machine.device)
    seconds = min(timed(partial(gradient, model, [idx], machine)) for _ in range(2))
    hours = updates * config.grad_accum * seconds / 3600 / world()
    print(f"time: {hours:.1f} hours at {idx.numel() / seconds:,.0f} tokens/s, the gradient of one micro-batch on "
          f"{machine.device} in {machine.dtype}, not compiled")


EXAMPLES = """examples:
  python pmp.py --rho 0.7                        a few minutes on a laptop
  python pmp.py --rho 1.0 --out out-dense        the same without PMP
  python pmp.py --data my.jsonl.xz --out mine    on your own text
  python pmp.py --preset tinyllama --plan        what the paper's run takes
  python pmp.py --preset tinyllama --out paper   the paper's run
  python pmp.py --resume paper                   after Ctrl-C or a power cut
"""


def parse(argv):
    """(Config, None, whether to plan only) for a new run, or ({machine flag: value}, OUT, False) for --resume OUT."""
    parser = Parser("Pre-train with a private mask, and release the weights without it.", epilog=EXAMPLES)
    parser.add_fields(Config, typed_only=True, show=default_text)
    parser.add_argument("--resume", metavar="OUT", help="go on with the run in OUT; it keeps its settings")
    parser.add_argument("--plan", action="store_true", help="print what the run would take, and do nothing")
    given = vars(parser.parse_args(argv))
    out, planned = given.pop("resume"), given.pop("plan")
    if out is not None:
        if unwanted := [name for name in given if name not in MACHINE]:
            raise UserError(f"--resume keeps the settings of the run: leave out {flag_name(unwanted[0])}")
        require(not planned, "--plan has no meaning with --resume: leave one out")
        return given, out, False
    config = Config(**{**PRESETS[given.get("preset", Config.preset)].defaults, **given})
    if "warmup" not in given:
        config.warmup = min(config.warmup, config.steps // 10)
    check(config)
    return config, None, planned


def default_text(f):
    """What -h says of the default of a Config field."""
    if f.default is None or f.name == "cache":
        return ""
    if f.name in LAPTOP:
        return f" [{LAPTOP[f.name]}; gpt2, tinyllama: {f.default}]"
    return f" [{f.default}]"


def new_run(config, folder):
    """Draw the secret of theta(0), and write down what the run is before it begins."""
    folder.check_unused()
    # resumed elsewhere, "auto" could be another one
    config.dtype = from_first(lambda: Machine(config.device, config.dtype).dtype)
    secret = from_first(secrets.token_bytes, 32)
    if config.init_seed is not None:
        secret = f"init-seed {config.init_seed}".encode()
        print("note: with --init-seed anyone who guesses the number can redraw the initial weights and read the mask "
              "off the release", flush=True)
    run = Run(config, secret, folder)
    folder.write_record({"config": asdict(config), "init_secret": run.secret.hex(),
                         "tokenizer": run.tokenizer.fingerprint})
    return run


def resumed_run(machine_flags, folder):
    """The run that a folder holds, with its own settings, checked like those of a new one."""
    record = folder.read_record()
    try:
        require(record["config"].keys() == asdict(Config()).keys(), "other settings")
        config = Config(**{**record["config"], "out": str(folder.out), **machine_flags})
        secret, tokenizer = bytes.fromhex(record["init_secret"]), record["tokenizer"]
        require(len(secret) == 32 or config.init_seed is not None, "another secret")
    except (ValueError, KeyError, TypeError, AttributeError, UserError):
        raise UserError(f"{folder.record} is damaged: restore it from a copy, or start a new run") from None
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{folder.record}: {error}") from None
    folder.load(identity(config, secret, tokenizer))  # an edited record shows before any text is prepared for it
    run = Run(config, secret, folder)
    if run.tokenizer.fingerprint != tokenizer:
        raise UserError(f"the text or tokenizer of {folder.out} has changed since the run began: put the old one back")
    return run


def main(argv=None):
    join_ranks()
    config, out, planned = from_first(parse, argv)
    if planned:
        plan(config)
        leave_ranks()
        return
    with Folder(config.out if out is None else out) as folder:
        run = new_run(config, folder) if out is None else resumed_run(config, folder)
        try:
            with StopRequest() as run.stop:  # from here on Ctrl-C waits for the end of a step
                run.begin()
                pmp(run)
        except FloatingPointError as error:
            where = f"after step {run.progress.last} of stage {run.progress.stage}"
            raise Stopped(f"{where if run.progress.stage else 'in the first step'}: {error}; the last good checkpoint "
                          f"stays in {folder.private}; start a new run with a lower --lr") from None
    print(f"\nreleased {folder.release}; keep {folder.private} to yourself\n\na sample of the release:")
    start = torch.tensor([[run.tokenizer.eos]], device=run.machine.device)
    text = run.model.generate(start, 120, eos=run.tokenizer.eos, seed=run.config.seed)[0, 1:].tolist()
    print(run.tokenizer.decode(text))
    leave_ranks()


if __name__ == "__main__":
    command_line(main)
