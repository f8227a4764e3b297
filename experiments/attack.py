"""Guess the mask of a release, from public knowledge and a shadow: a run that the attacker makes with his own secret.

    python pmp.py --preset tiny --data FILE --out shadow         the same shape and public text, any --seed
    python experiments/attack.py out/release --shadow shadow     writes guess.safetensors, a file for --mask
    python experiments/attack.py out/release --shadow shadow --mask out/private/mask.safetensors     with scores

The early-bird ticket is a function of text, architecture and a start that matters little, so a shadow knows much of it.
The attacks, from weak to strong:

    gradient      |gradient| on public text (section 5.2, but with rho known)
    distance      |weight| over the spread of theta(0): training makes weights larger
    shadow        how often the shadow's ticket has weights of the same kind, and of the same token. It never looks at
                  the release
    classifier    trained on the shadow, whose mask the attacker knows, over features of each weight; then applied here
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from measure import auc, gradient
from sklearn.ensemble import HistGradientBoostingClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, UserError, command_line, path, say  # noqa: E402
from data.text import CACHE, prepare  # noqa: E402
from model import initial_value, load_folder  # noqa: E402
from pmp import iou, load_checkpoint, load_mask, save_mask, topk_mask, unpack_mask  # noqa: E402

BATCHES = 10  # of 16 x 256 tokens of public text, for gradients
SAMPLE = 400_000  # weights that the classifier is trained on
ORDER = 2**31  # seed of the order in which the attacker reads the public text: no run has it
TOKENS = ("embed_tokens", "lm_head", "wte")  # their rows belong to tokens, and mean the same in every run


def kind(name):
    """"mlp.up_proj" of "model.layers.3.mlp.up_proj.weight": what parameters of all layers have in common."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def spreads(model):
    """{name: standard deviation of theta(0)}, which the code publishes; of gains and biases it is 0."""
    return {name: float(initial_value(model, name, p.shape, b"public").std(correction=0))
            for name, p in model.named_parameters()}


def mean_gradient(model, tokens):
    """{name: mean |gradient| over mini-batches of public text}."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in range(BATCHES):
        for name, g in gradient(model, tokens, 16 * batch).items():
            total[name] += g.abs() / BATCHES
    return total


def distance(p, spread):
    """|weight| over the spread of theta(0); a gain or bias is far where it is not the commonest value."""
    if spread:
        return p.abs() / spread
    return (p != p.flatten().mode().values).float() * 10


def shadow_scores(masks):
    """{name: tensor}: the share of the ticket among the shadow's weights of this kind and layer, or of this token."""
    scores = {}
    for name, mask in masks.items():
        share = mask.float().mean()
        if any(word in name for word in TOKENS):
            share = mask.float().mean(1, keepdim=True)
        scores[name] = share.expand(mask.shape)
    return scores


def features(model, spread, grads, counts):
    """Yield (name, (n, F) float32): what is known of each of the n weights of a parameter without the mask.

    spread: of spreads(); grads: of mean_gradient(); counts: (V,), how often each token is in the public text.
    """
    kinds = sorted({kind(name) for name, _ in model.named_parameters()})
    for number, (name, p) in enumerate(model.named_parameters()):
        far, g = distance(p.detach(), spread[name]), (grads[name] + 1e-12).log10()
        columns = [torch.full(p.shape, float(kinds.index(kind(name)))), torch.full(p.shape, float(number)), far, g]
        for value in (far, (far < 0.1).float(), (far > 2.5).float(), g):  # what is usual in its tensor, row, column
            columns.append(value.mean().expand(p.shape))
            for dim in range(p.ndim):
                columns.append(value.mean(dim, keepdim=True).expand(p.shape))
            if p.ndim == 1:
                columns.append(torch.zeros(p.shape))
        for value in (far, g):  # its place in its row
            columns.append(value.argsort(-1).argsort(-1) / p.size(-1))
        token = torch.full(p.shape, -1.0)
        if any(word in name for word in TOKENS):
            token = (counts + 1).log()[:, None].expand(p.shape)
        columns.append(token)
        yield name, torch.stack([c.flatten() for c in columns], 1).numpy()  # (n, F)


def attack(model, tokenizer, shadows, cache=CACHE):
    """{attack: {name: score}} for a release, larger where a weight is more likely in the ticket; and the guess's size.

    shadows: folders of runs of the same shape. Raises UserError where one does not fit.
    """
    params = dict(model.named_parameters())
    d = sum(p.numel() for p in params.values())
    spread, generator = spreads(model), np.random.default_rng(0)
    scores = {"shadow": {name: torch.zeros(p.shape) for name, p in params.items()}}
    k = None  # the size of the guess: that of the shadows' tickets
    rows, labels = [], []  # (n, F) features of a sample of the shadows' weights; (n,) whether they are in the ticket
    for folder in shadows:
        saved = load_checkpoint(folder)
        if not saved or not saved["mask"] or saved["settings"]["init"] or not (Path(folder) / "release").exists():
            raise UserError(f"{folder} is no finished run with a ticket of its own: make one with pmp.py and no --init")
        shadow, its_tokenizer = load_folder(Path(folder) / "release")
        if its_tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"{folder} has another tokenizer than the release: train it on the same text")
        masks = unpack_mask(saved["mask"], params)
        its_k = math.floor(saved["settings"]["rho"] * d)
        if k not in (None, its_k):
            raise UserError(f"{folder} has another rho than the shadow before it: give runs with the release's rho")
        k = its_k
        tokens = prepare(saved["settings"]["data"], tokenizer, 0, ORDER, cache)[1]
        ids = tokens.read(0, 1000, 256)
        counts = torch.bincount(ids.flatten(), minlength=tokenizer.size).float()  # (V,)
        for name, score in shadow_scores(masks).items():
            scores["shadow"][name] += score
        for name, known in features(shadow, spread, mean_gradient(shadow, tokens), counts):
            share = len(known) / d / len(shadows)
            chosen = generator.choice(len(known), min(len(known), math.ceil(SAMPLE * share)), replace=False)
            rows.append(known[chosen])
            labels.append(masks[name].flatten().numpy()[chosen])
    classifier = HistGradientBoostingClassifier(max_iter=300, learning_rate=0.1, max_leaf_nodes=63, random_state=0)
    classifier.fit(np.concatenate(rows), np.concatenate(labels))
    scores["gradient"] = mean_gradient(model, tokens)  # on the last shadow's text: all of them read the same one
    scores["distance"] = {name: distance(p.detach(), spread[name]) for name, p in params.items()}
    scores["classifier"] = {}
    for name, known in features(model, spread, scores["gradient"], counts):
        probability = classifier.predict_proba(known)[:, 1]
        scores["classifier"][name] = torch.from_numpy(probability).float().view(params[name].shape)
    return scores, k


def judge(scores, masks, k):
    """{attack: {"found", "iou", "auc", "surest"}} against the true mask.

    found: the share of the ticket in the guess of its size, which is also the share of the guess that is ticket.
    surest: the latter for the surest 30%.
    """
    total = sum(mask.numel() for mask in masks.values())
    ticket = sum(int(mask.sum()) for mask in masks.values())
    inside = torch.cat([mask.flatten() for mask in masks.values()])
    results = {}
    for name, score in scores.items():
        guess, few = topk_mask(score, k), topk_mask(score, int(0.3 * total))
        flat = torch.cat([score[key].flatten() for key in masks])
        results[name] = {"found": sum(int((guess[key] & masks[key]).sum()) for key in masks) / ticket,
                         "iou": iou(guess, masks), "auc": auc(flat[inside], flat[~inside]),
                         "surest": sum(int((few[key] & masks[key]).sum()) for key in masks) / int(0.3 * total)}
    return results


def main():
    parser = Parser("Guess the mask of a release, from public knowledge and a run of your own.")
    parser.add_argument("release", type=path)
    parser.add_argument("--shadow", type=path, nargs="+", required=True, metavar="OUT",
                        help="the --out of runs of pmp.py with the release's shape, text and rho")
    parser.add_argument("--mask", type=path, help="the true mask: says how good the guesses are")
    parser.add_argument("--guess", type=path, default="guess.safetensors",
                        help="where the best guess is written [guess.safetensors]")
    parser.add_argument("--cache", type=path, default=CACHE, help="folder that keeps prepared text")
    args = parser.parse_args()
    model, tokenizer = load_folder(args.release)
    params = dict(model.named_parameters())
    truth = load_mask(args.mask, params) if args.mask else None
    if Path(args.guess).exists():
        raise UserError(f"{args.guess} exists: name another --guess")
    scores, k = attack(model, tokenizer, args.shadow, args.cache)
    save_mask(args.guess, topk_mask(scores["classifier"], k), params)
    say(f"the classifier's guess is in {args.guess}")
    if truth:
        total = sum(p.numel() for p in params.values())
        say(f"attack      found   IoU     AUC     surest 30%    (a random guess finds {k / total:.0%})")
        for name, result in judge(scores, truth, k).items():
            say(f"{name:<12}" + f"{result['found']:.1%}   {result['iou']:.3f}   {result['auc']:.3f}   "
                f"{result['surest']:.1%}")


if __name__ == "__main__":
    command_line(main)
