"""Beyond the paper: what a determined outsider can do. Guesses at the mask, and ways to fine-tune without it.

Each guess is a score for every parameter, judged by its AUC and, with rho known, by the IoU of its top rho. Functions
take `shop`, run.py's Workshop, and `release`, the pre-trained model that is attacked.
"""

import copy
import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from measures import auc, auc_by_kind, gradient

from glue import Settings, default_rate, fit
from model import initial_std, initial_value, initialise
from pmp import MaskedAdamW, iou, random_mask, topk_mask

# -----------------------------------------------------------------------------
# recovery: {name: tensor}, larger where a parameter is more likely in the ticket


def gradient_score(shop, release, batches):
    """|gradient| of the released weights on public text, the sum over mini-batches (section 5.2's adversary)."""
    return added_gradients(shop, release, release.body, batches)


def added_gradients(shop, release, body, batches):
    """{name: the sum of |gradient| of `body` over mini-batches of public text}."""
    scores = {name: torch.zeros_like(p) for name, p in body.named_parameters()}
    for index in range(batches):
        for name, g in gradient(body, shop.public(release, index), shop.machine).items():
            scores[name] += g.abs()
    return scores


def magnitude_score(shop, release):
    """The weights' size: training makes weights larger."""
    return {name: p.detach().abs() for name, p in release.body.named_parameters()}


def initial_spread(release):
    """{name: standard deviation of theta(0)}, which is public: any secret will do to measure it."""
    return {name: float(initial_value(release.body, name, p.shape, b"public").std(correction=0))
            for name, p in release.body.named_parameters()}


def distance_score(shop, release, bins=200):
    """How improbable a weight is as a draw of theta(0), given how many weights of its tensor lie there.

    A tensor is a mixture of frozen draws of N(0, s) and trained weights. With p the density of its |w| and f that of
    |N(0, s)|, a weight is frozen with probability c f / p, where c, the frozen share, is at most the minimum of p / f.
    """
    scores = {}
    for (name, p), spread in zip(release.body.named_parameters(), initial_spread(release).values()):
        w = p.detach()
        if not spread:  # a norm gain or bias, whose initial value is a constant: see constant_score
            scores[name] = (w != w.flatten().mode().values).float()
            continue
        x = (w.abs() / spread).clamp(max=6)
        place = (x / 6 * (bins - 1)).long()
        edges = torch.arange(bins + 1, device=x.device) * (6 / (bins - 1))
        expected = torch.erf(edges / 2**0.5).diff().clamp(min=1e-12) * x.numel()
        found = torch.bincount(place.flatten(), minlength=bins).float()
        ratio = found / expected
        common = expected > 100  # bins with enough weights to trust
        frozen = ratio[common].min() if common.any() else ratio.min()
        scores[name] = 1 - (frozen / ratio.clamp(min=1e-9)).clamp(max=1)[place]
    return scores


def constant_score(shop, release):
    """Constants that never moved: a norm gain at exactly 1 was frozen. Of all other parameters it knows nothing."""
    return {name: torch.ones_like(p) if spread else (p.detach() != p.detach().flatten().mode().values).float()
            for (name, p), spread in zip(release.body.named_parameters(), initial_spread(release).values())}


def rehearsal_score(shop, release, steps=50, batches=5):
    """The outsider's own EarlyBird: a warm-up of other random weights on the public text, then |gradient|. No
    weight of the release enters, so what it finds is what any ticket of this architecture and text has in common."""
    body = copy.deepcopy(release.body)
    initialise(body, b"the outsider's own")
    train_on_public_text(shop, release, body, steps)
    return added_gradients(shop, release, body, batches)


def gap_share(std):
    """Share of the fp32 numbers with a mantissa of at least that of `std` that are z * std of no fp32 z, if rounded.

    For z in [1, 2) the products step over fp32 numbers while they are below the next power of two: of m, the mantissa
    of std, numbers they hit one.
    """
    return 1 - 0.5 / math.frexp(np.float32(std))[0]


def impossible(values, std):
    """Which fp32 values are z * fl32(std) of no fp32 z, in fp32. theta(0) used to be such products; no frozen weight
    was ever one of the other values, and a trained one often."""
    values, std = values.detach().cpu().numpy(), np.float32(std)
    z = values / std
    near = [z, np.nextafter(z, np.float32(np.inf)), np.nextafter(z, np.float32(-np.inf))]
    return torch.from_numpy(~np.any([one * std == values for one in near], axis=0))


def could_be_impossible(values, std):
    """Which fp32 values lie where there are impossible ones: their mantissa is at least that of std."""
    return torch.frexp(values.detach().cpu()).mantissa.abs() >= math.frexp(np.float32(std))[0]


def lattice_score(shop, release):
    """Of each entry alone: 1 where it is impossible; where it could have been but is not, less than elsewhere."""
    scores = {}
    for name, p in release.body.named_parameters():
        scores[name] = torch.full(p.shape, 0.5)
        if std := initial_std(release.body, name):
            scores[name][could_be_impossible(p, std)] = 0.4
            scores[name][impossible(p, std)] = 1.0
    return scores


def pooled_lattice_score(shop, release, rounds=10):
    """The same evidence by expectation-maximisation: an entry was trained with the odds of its row times its column."""
    scores = {}
    for name, p in release.body.named_parameters():
        scores[name] = torch.full(p.shape, release.rho)
        std = initial_std(release.body, name)
        if not std:
            continue
        gaps = impossible(p, std)
        missed = torch.where(could_be_impossible(p, std), 1 - gap_share(std), 1.0)  # P(possible | trained)
        prior = scores[name]
        for _ in range(rounds):
            trained = torch.where(gaps, 1.0, prior * missed / (prior * missed + 1 - prior))
            prior = torch.sigmoid(logit(trained.mean(0, keepdim=True)) + logit(trained.mean(1, keepdim=True))
                                  - logit(trained.mean()))
        scores[name] = trained
    return scores


def logit(share):
    """log(share / (1 - share)), share kept within 0.001 of 0 and 1."""
    return torch.logit(share.clamp(1e-3, 1 - 1e-3))


def pooled_score(shop, release):
    """The distances again, each read in the light of its row and column. The ticket is not spread evenly: a token that
    the warm-up's last batch lacked leaves a whole row of the embedding frozen."""
    pooled = {}
    for name, score in score_of(shop, release, DISTANCE).items():
        pooled[name] = score
        if score.ndim > 1:
            evidence = logit(score.mean(0, keepdim=True)) + logit(score.mean(1, keepdim=True)) - 2 * logit(score.mean())
            pooled[name] = torch.sigmoid(logit(score) + evidence)
    return pooled


def combined_score(shop, release, weight=0.3):
    """Ranks of the pooled distances plus `weight` times those of the outsider's own EarlyBird (0.3 was best of 0.1 to 1
    on another model, in earlier work)."""
    total = {}
    for name, share in (("distance, pooled by row and column", 1.0), ("own EarlyBird", weight)):
        scores = score_of(shop, release, name)
        flat = torch.cat([score.flatten() for score in scores.values()])
        ranks = torch.empty_like(flat).scatter_(0, flat.argsort(), torch.arange(len(flat)) / len(flat))
        for key, part in zip(scores, ranks.split([score.numel() for score in scores.values()])):
            total[key] = total.get(key, 0) + share * part.view_as(scores[key])
    return total


CONSTANTS, DISTANCE = "constants that never moved", "distance from theta(0)'s distribution"
SCORES = {
    **{f"gradient, {n} batch{'es' * (n > 1)}": partial(gradient_score, batches=n) for n in (1, 10, 100)},
    "weight magnitude": magnitude_score,
    DISTANCE: distance_score,
    "distance, pooled by row and column": pooled_score,
    CONSTANTS: constant_score,
    "own EarlyBird": rehearsal_score,
    "combined": combined_score,
    "lattice, per entry": lattice_score,
    "lattice, with rows and columns": pooled_lattice_score,
    "random": lambda shop, release: {name: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)).to(p.device)
                                    for name, p in release.body.named_parameters()},
}


def score_of(shop, release, name):
    """A score of SCORES, computed once for each release."""
    if (name, release.weights) not in shop.known:
        shop.known[name, release.weights] = {key: s.cpu() for key, s in SCORES[name](shop, release).items()}
    return shop.known[name, release.weights]


def guess(shop, release, name):
    """The {name: bool mask} that an outsider who knows rho makes of a score."""
    scores = score_of(shop, release, name)
    if name == CONSTANTS:  # it has no order
        masks = {key: score > 0 for key, score in scores.items()}
    else:
        masks = topk_mask(scores, int(release.rho * sum(score.numel() for score in scores.values())))
    return {key: mask.to(shop.machine.device) for key, mask in masks.items()}


def recovery(shop, release, masks, attack):
    """{"auc", "iou", …} of one attack of RECOVERIES on a release whose true mask is `masks`."""
    if attack in REPLAYS:
        return replay(shop, release, masks, REPLAYS[attack](release))
    if attack == "release folder":
        return leak(shop, release)
    scores = score_of(shop, release, attack)
    flat = torch.cat([scores[key].flatten() for key in masks])
    true = torch.cat([mask.flatten() for mask in masks.values()]).cpu()
    return {"auc": auc(flat[true], flat[~true]), "iou": iou(guess(shop, release, attack), masks)}


BY_KIND = ("gradient, 10 batches", "weight magnitude", DISTANCE, "distance, pooled by row and column")


def recovery_by_kind(shop, release, masks):
    """{"auc": {score: auc_by_kind}} of the scores of BY_KIND: does one kind of tensor give the mask away?"""
    return {"auc": {name: auc_by_kind(score_of(shop, release, name), masks) for name in BY_KIND}}


def replay(shop, release, masks, secret):
    """Redraw theta(0) from a secret or a guess of it, and call trained what differs from the release."""
    found = {name: initial_value(release.body, name, p.shape, secret).to(p.device) != p.detach()
             for name, p in release.body.named_parameters()}
    same = sum(int((~found[name]).sum()) for name in found)
    return {"iou": iou(found, masks), "entries_recognised": same,
            "frozen": sum(int((~mask).sum()) for mask in masks.values())}


def leak(shop, release):
    """Compare the folders of a masked and a dense release: what else than the weights differs?"""
    folders = [release.out / "release", shop.release("dense", release.seed).out / "release"]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    others = [name for name in names[0] if name != "model.safetensors"]
    differ = [name for name in others if len({(folder / name).read_bytes() for folder in folders}) > 1]
    headers = []
    for folder in folders:
        with open(folder / "model.safetensors", "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header["__metadata__"].pop("crc32")  # a function of the weights
        headers.append(hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest())
    return {"files": names[0], "same_files": names[0] == names[1], "differing": differ,
            "same_header": headers[0] == headers[1]}


REPLAYS = {  # the secret that an attacker redraws theta(0) from
    "replay, the secret is known": lambda release: bytes.fromhex(release.record["init_secret"]),
    "replay, the secret is kept": lambda release: b"a guess",
}
RECOVERIES = (*SCORES, *REPLAYS, "release folder")


# -----------------------------------------------------------------------------
# adaptation


@dataclass(frozen=True)
class Adversary:
    """A way to fine-tune a release."""

    name: str
    method: str = "full"  # of glue.py
    settings: dict = field(default_factory=dict)  # of glue.Settings
    mask: object = None  # (shop, release) -> the {name: bool mask} to train inside of
    change: object = None  # (shop, release, body) does something to the weights first
    optimizer: object = MaskedAdamW
    rate: float = 1.0  # what the learning rates are multiplied by
    longer: int = 1  # what the epochs are multiplied by

    def __repr__(self):
        """What tells two settings apart, without addresses in memory."""
        return f"{self.name} {self.method} {sorted(self.settings.items())} {self.rate:g} {self.longer}"


class Stepper:
    """Any torch optimizer with the step() of MaskedAdamW, without weight decay.

    scale(name, height) multiplies the learning rate of a parameter; height is 0 at the embedding, 1 at the head.
    """

    def __init__(self, build, scale, params, masks, weight_decay, betas):
        layer = {name: next((int(word) for word in name.split(".") if word.isdigit()), None) for name in params}
        layers = 1 + max(number for number in layer.values() if number is not None)
        groups = []
        for name, p in params.items():
            low = any(part in name for part in ("embed", "wte", "wpe"))
            height = 1 - low if layer[name] is None else (1 + layer[name]) / (1 + layers)
            p.requires_grad_(scale(name, height) > 0)
            if p.requires_grad:
                groups.append({"params": [p], "scale": scale(name, height)})
        self.optimizer = build(groups)

    def step(self, lr, clip):
        groups = self.optimizer.param_groups
        norm = float(torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip))
        if not np.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        for group in groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class Lion(torch.optim.Optimizer):
    """Chen et al., 2023: the sign of an interpolated momentum."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1e-4})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.add_(torch.lerp(momentum, p.grad, 0.1).sign_(), alpha=-group["lr"])
                    momentum.lerp_(p.grad, 0.01)


ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)


def other(build, scale=lambda name, height: 1.0):
    """What makes a Stepper in the place of a MaskedAdamW. build(groups): a torch optimizer."""
    return partial(Stepper, build, scale)


def only(*parts):
    """AdamW on the parameters whose name has one of `parts`."""
    return other(ADAMW, lambda name, height: float(any(part in name for part in parts)))


class PublicText:
    """The public text as `fit` wants it."""

    def __init__(self, shop, release, model, updates):
        self.shop, self.release, self.model, self.updates = shop, release, model, updates

    def batches(self, epoch):
        return range(self.updates)

    def loss(self, index):
        idx = self.shop.public(self.release, index)
        return self.model(idx, idx)

    def evaluate(self):
        """Nobody asks."""


def train_on_public_text(shop, release, body, updates, masks=None):
    """Train `body` in place, inside `masks` where given, at five times the rate of full fine-tuning."""
    optimizer = MaskedAdamW(dict(body.named_parameters()), masks, 0.0)
    rate = 5 * default_rate("full", body.embedding().weight.size(1))
    fit(PublicText(shop, release, body, updates), optimizer, rate, Settings(epochs=1), shop.machine)


def continue_pretraining(shop, release, body, updates, masks=None):
    """Train on the public text again, before fine-tuning; inside a suspected ticket where masks says so. Done once for
    each release: every fine-tuning of a search begins from the same weights."""
    key = "continued", updates, masks, release.weights
    if key not in shop.known:
        train_on_public_text(shop, release, body, updates, masks and masks(shop, release))
        shop.known[key] = {name: p.detach().cpu() for name, p in copy.deepcopy(body).named_parameters()}
    with torch.no_grad():
        for name, p in body.named_parameters():
            p.copy_(shop.known[key][name])


def reset(shop, release, body, how):
    """Replace the suspected complement: "zero", "redraw" from theta(0)'s distribution, or "halve"."""
    masks = guess(shop, release, BEST)  # may train, and so needs gradients
    with torch.no_grad():
        for name, p in body.named_parameters():
            if p.ndim > 1:
                new = {"zero": torch.zeros_like(p), "halve": p / 2,
                       "redraw": initial_value(body, name, p.shape, b"outsider").to(p.device)}[how]
                p.copy_(torch.where(masks[name], p, new))


@torch.no_grad()
def shrink_and_perturb(shop, release, body, keep=0.7):
    """Ash and Adams, 2020: theta <- keep * theta + (1 - keep) * a new random initialisation."""
    for name, p in body.named_parameters():
        p.mul_(keep).add_(initial_value(body, name, p.shape, b"outsider").to(p.device), alpha=1 - keep)


@torch.no_grad()
def rescale(shop, release, body, factor=30.0):
    """The positive control of "held back": the same function from weights that default tuning does badly on.

    The gain (and the bias) of each block's norms grows by `factor`, the matrices that read their output shrink by it.
    """
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight", "ln_1.weight", "ln_1.bias", "ln_2.weight",
             "ln_2.bias")
    readers = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight",
               "c_attn.weight", "c_fc.weight")
    for name, p in body.named_parameters():
        if name.endswith(norms):
            p.mul_(factor)
        if name.endswith(readers):
            p.div_(factor)


def guessed(name):
    """What makes a mask of a score, as Adversary.mask wants it."""
    return lambda shop, release: guess(shop, release, name)


def blind(rho):
    """What makes a random mask, as Adversary.mask wants it."""
    def mask(shop, release):
        params = dict(release.body.named_parameters())
        return random_mask(params, int(rho * sum(p.numel() for p in params.values())), b"outsider")
    return mask


BEST = "combined"  # the best recovered mask
# these need no guess at the mask, so that they can be tried on the dense model too
PLAIN = [
    Adversary("base", "base"), Adversary("scratch", "scratch"), Adversary("full"), Adversary("lora", "lora"),
    Adversary("rescaled", change=rescale),
    Adversary("full, three times the epochs", longer=3),
    *(Adversary(f"LoRA, rank {r}", "lora", {"lora_rank": r, "lora_alpha": 2.0 * r}) for r in (4, 16, 32, 64)),
    Adversary("SGD with momentum", optimizer=other(partial(torch.optim.SGD, momentum=0.9)), rate=300.0),
    Adversary("Lion", optimizer=other(Lion), rate=0.3),
    Adversary("Adafactor", optimizer=other(torch.optim.Adafactor), rate=30.0),
    Adversary("RMSprop", optimizer=other(torch.optim.RMSprop), rate=0.3),
    Adversary("Adagrad", optimizer=other(torch.optim.Adagrad), rate=10.0),
    Adversary("batch of 8", settings={"batch_size": 8}, rate=0.5),
    Adversary("no clipping, no weight decay", settings={"clip": float("inf"), "weight_decay": 0.0}),
    Adversary("strong weight decay", settings={"weight_decay": 1.0}),
    Adversary("attention alone", optimizer=only("attn")),
    Adversary("MLP alone", optimizer=only("mlp")),
    Adversary("norms alone", optimizer=only("norm", "ln_"), rate=10.0),
    Adversary("all but embedding and head", optimizer=only("attn", "mlp", "norm", "ln_")),
    Adversary("upper half only", optimizer=other(ADAMW, lambda name, height: float(height > 0.5))),
    Adversary("layer-wise rates", optimizer=other(ADAMW, lambda name, height: 10 ** (height - 1)), rate=3.0),
    Adversary("continued pre-training, 50 updates", change=partial(continue_pretraining, updates=50)),
    Adversary("continued pre-training, 200 updates", change=partial(continue_pretraining, updates=200)),
    Adversary("shrink and perturb", change=shrink_and_perturb),
]
SUSPICIOUS = [
    Adversary("random mask, rho 0.7", mask=blind(0.7)), Adversary("random mask, rho 0.5", mask=blind(0.5)),
    *(Adversary(f"mask from {name}", mask=guessed(name)) for name in SCORES if name != "random"),
    *(Adversary(f"{how} the suspected complement", change=partial(reset, how=how))
      for how in ("zero", "redraw", "halve")),
    Adversary("continued pre-training of the suspected ticket", mask=guessed(BEST),
              change=partial(continue_pretraining, updates=50, masks=guessed(BEST))),
]
ADVERSARIES = {adversary.name: adversary for adversary in PLAIN + SUSPICIOUS}
NEEDS_GUESS = {adversary.name for adversary in SUSPICIOUS}
