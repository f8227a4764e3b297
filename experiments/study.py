"""The study: train the models of PROTOCOL.md, tune them, and write a line of JSON for each result.

    python experiments/study.py --text FILE --out out-experiments      start it once for each core

Each process takes the next piece that is ready and that no other process is at. A piece that was stopped goes on where
it was. The lines are in OUT/study.jsonl; report.py makes the tables of them. Every model is trained by pmp.py and every
task by `pmp.py --init` or glue.py, with their own flags; what this file adds is the list of pieces, and `evaluate`.
"""

import argparse
import json
import random
import secrets
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import measure_run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import glue  # noqa: E402
import pmp  # noqa: E402
from common import autocast, fingerprint, lock, pick_dtype, save_safetensors  # noqa: E402
from data.text import documents, prepare, undivided  # noqa: E402
from model import load_folder  # noqa: E402

PIECE = 4000  # characters: a longer document is cut, so that none fills an update
TEXT = 150_000_000  # characters: 10 tokens a parameter
STEPS = 1560  # of 8 x 256 tokens: 3.19M, one a parameter of mini-untied
PAIRS = range(8)  # models with the same number share theta(0), the order of the text, and the settings
RATES = (1, 2, 4, 8, 16)  # times glue.py's rate for this width, which is 5e-5 * 768 / 192
BASE_RATE = 2e-4
TUNING = ["--steps", "64", "--batch-size", "8", "--block-size", "128", "--val-every", "64", "--val-blocks", "1",
          "--save-every", "64", "--compile", "off"]
ARMS = {  # name: (the model that is tuned, whose mask)
    "outsider": ("pmp", None),
    "dense": ("dense", None),
    "authorised": ("pmp", "pmp"),
    "dense in the mask": ("dense", "pmp"),
    "guessed mask": ("pmp", "guess"),  # what attack.py finds
    "random": ("random", None),
    "matched": ("matched", None),
}
MODELS = {  # name: what is typed after the settings that all models share
    "pmp": ["--rho", "0.7"],
    "dense": ["--rho", "1.0"],
    "random": ["--rho", "0.7", "--ticket", "random"],
    "matched": ["--rho", "1.0", "--steps", str(STEPS * 8 // 10)],  # dense, with a higher loss than dense
    "noisy": ["--rho", "0.7"],  # a mend of the recovery: the scores of the ticket are multiplied with secret noise
}
NOISE = 2.0  # standard deviation of the logarithm of that noise; that of |gradient| is about as large


def pieces():
    """All pieces of work in the order of their importance, each a dict that is its key in the results."""
    for pair in PAIRS:
        for model in ("pmp", "dense", "random"):
            yield {"do": "train", "model": model, "length": 1, "pair": pair}
        for arm in ("outsider", "dense", "authorised", "dense in the mask", "random"):
            yield from tunings(arm, 1, pair)
    for pair in PAIRS:
        yield {"do": "attack", "model": "pmp", "pair": pair}
        if pair < 4:
            yield {"do": "measure", "model": "pmp", "pair": pair}
            yield {"do": "measure", "model": "dense", "pair": pair}
        yield from tunings("guessed mask", 1, pair)
    for pair in (0, 1, 2):
        for model, mask in (("dense", False), ("pmp", False), ("pmp", True)):
            for task in ("cola", "rte", "sst2"):
                yield {"do": "glue", "model": model, "mask": mask, "task": task, "pair": pair}
    for pair in PAIRS:
        yield {"do": "train", "model": "matched", "length": 1, "pair": pair}
        yield from tunings("matched", 1, pair)
    for pair in range(3):
        yield {"do": "train", "model": "noisy", "length": 1, "pair": pair}
        yield {"do": "attack", "model": "noisy", "pair": pair}
        yield {"do": "attack", "model": "random", "pair": pair}
    for length in (3, 10):
        for pair in range(4):
            for model in ("pmp", "dense"):
                yield {"do": "train", "model": model, "length": length, "pair": pair}
            for arm in ("outsider", "dense", "authorised"):
                yield from tunings(arm, length, pair)


def tunings(arm, length, pair):
    """The pieces of one arm: all rates, and two orders of the text."""
    for rate in RATES:
        for seed in (0, 1):
            yield {"do": "tune", "arm": arm, "length": length, "pair": pair, "rate": rate, "seed": seed}


def folder_of(out, model, length, pair):
    return out / "models" / f"{model}-{length}-{pair}"


def prepare_text(source, target):
    """Write the text of the study: documents cut into pieces of at most PIECE characters, in random order."""
    texts = undivided(source)
    if source == "slimpajama":
        texts = (text for _, text in documents(source, "train"))
    cut, size = [], 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            cut.append(text[start:start + PIECE])
        size += len(text)
        if size > TEXT:
            break
    random.Random(0).shuffle(cut)
    with open(target.with_suffix(".partial"), "w", encoding="utf-8") as file:
        for text in cut:
            file.write(json.dumps({"text": text}) + "\n")
    target.with_suffix(".partial").rename(target)


@torch.no_grad()
def evaluate(model, tokens, dtype, blocks=128, block_size=256):
    """(loss in nats, accuracy in percent) of the next token, over the first `blocks` held-out blocks."""
    loss, right, count = 0.0, 0, 0
    blocks = min(blocks, tokens.blocks(block_size))
    for start in range(0, blocks, 8):
        idx = tokens.read(start, min(8, blocks - start), block_size)  # (B, T)
        with autocast(idx.device, dtype):
            logits = model(idx)[:, :-1].float()  # (B, T - 1, V)
        target = idx[:, 1:]
        loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == target).sum())
        count += target.numel()
    return {"loss": loss / count, "accuracy": 100 * right / count}


def judge(release, text, cache):
    """{"task": …, "text": …}: a release on documentation, the task, and on the text of pre-training."""
    model, tokenizer = load_folder(release)
    dtype = pick_dtype("auto", torch.device("cpu"))
    scores = {}
    for name, data in (("task", "prose"), ("text", str(text))):
        held = prepare(data, tokenizer, 0, 42, cache)[2]
        scores[name] = evaluate(model, held, dtype)
    return scores


def train(piece, text, out):
    """Pre-train a model. Returns its scores."""
    folder = folder_of(out, piece["model"], piece["length"], piece["pair"])
    steps = STEPS * piece["length"]
    argv = ["--out", str(folder), "--cache", str(out / "cache"), "--resume", "--compile", "on"]
    if piece["model"] == "pmp":
        argv += ["--preset", "mini-untied", "--data", str(text), "--seed", str(piece["pair"]), "--batch-size", "8",
                 "--steps", str(steps), "--val-every", "400", "--save-every", "400", "--device", "cpu"]
    else:
        argv += ["--twin", str(folder_of(out, "pmp", piece["length"], piece["pair"]))]
    torch._dynamo.reset()  # another model: what was compiled is of no use
    topk_mask = pmp.topk_mask
    if piece["model"] == "noisy":
        generator, noise = np.random.default_rng(secrets.randbits(128)), {}

        def noisy(scores, k):
            for name, score in scores.items():
                if name not in noise:
                    noise[name] = torch.from_numpy(np.exp(NOISE * generator.standard_normal(score.shape, np.float32)))
            return topk_mask({name: score.abs() * noise[name] for name, score in scores.items()}, k)

        pmp.topk_mask = noisy
    try:
        pmp.main(argv + MODELS[piece["model"]])
    finally:
        pmp.topk_mask = topk_mask
    scores = judge(folder / "release", text, out / "cache")
    return {**scores, "weights": fingerprint(dict(load_folder(folder / "release")[0].named_parameters()))}


def tune(piece, text, out):
    """Go on from a release with documentation. Returns the scores of the tuned model, which is not kept."""
    model, mask = ARMS[piece["arm"]]
    folder = folder_of(out, model, piece["length"], piece["pair"])
    with tempfile.TemporaryDirectory(dir=out) as place:
        argv = ["--init", str(folder / "release"), "--data", "prose", "--out", f"{place}/tuned", "--cache",
                str(out / "cache"), "--seed", str(piece["seed"]), "--lr", str(BASE_RATE * piece["rate"]), *TUNING]
        owner = folder_of(out, "pmp", piece["length"], piece["pair"])
        file = owner / "private" / "mask.safetensors"
        if mask == "guess":
            argv += ["--mask", str(guess_of(out, piece["pair"]))]
        elif mask and model == "pmp":
            argv += ["--mask", str(file)]
        elif mask:
            argv += ["--mask", str(mask_for(file, owner / "release", folder / "release", Path(place) / "mask"))]
        pmp.main(argv)
        return judge(f"{place}/tuned/release", text, out / "cache")


def mask_for(file, owner, release, target):
    """The mask of one release as a file for another release of the same shape."""
    params = dict(load_folder(owner)[0].named_parameters())
    others = dict(load_folder(release)[0].named_parameters())
    masks = pmp.load_mask(file, params)
    metadata = {"weights_sha256": fingerprint(others)}
    save_safetensors(target, pmp.pack_mask(masks), metadata, 0o600)
    return target


def run_glue(piece, out, glue_dir):
    """Fine-tune on a task of GLUE. glue.py writes the lines itself, into OUT/glue.jsonl."""
    folder = folder_of(out, piece["model"], 1, piece["pair"])
    argv = [str(folder / "release"), "--glue-dir", str(glue_dir), "--tasks", piece["task"], "--seed",
            str(piece["pair"]), "--results", str(out / "glue.jsonl"), "--device", "cpu"]
    if piece["task"] == "sst2":
        argv += ["--limit", "10000"]
    if piece["mask"]:
        argv += ["--mask", str(folder / "private" / "mask.safetensors")]
    glue.main(argv)
    return {}


def run_attack(piece, out):
    """Guess the mask of a pair's release. The shadow is the run of another pair: another secret, another order."""
    from attack import attack, judge as judge_guess, save_guess  # scikit-learn is needed here alone

    victim = folder_of(out, piece["model"], 1, piece["pair"])
    shadow = folder_of(out, piece["model"], 1, shadow_of(piece))
    scores, k = attack(victim / "release", [shadow], out / "cache")
    params = dict(load_folder(victim / "release")[0].named_parameters())
    if piece["model"] == "pmp":
        save_guess(guess_of(out, piece["pair"]), scores["classifier"], k, params)
    return judge_guess(scores, pmp.load_mask(victim / "private" / "mask.safetensors", params), k)


def guess_of(out, pair):
    return out / "models" / f"guess-{pair}.safetensors"


def shadow_of(piece):
    """The pair whose run is the attacker's."""
    return (piece["pair"] + 1) % (3 if piece["model"] == "noisy" else len(PAIRS))


def ready(piece, done):
    """Whether the models that a piece needs are there. done: the keys that have a result."""
    needs = []
    if piece["do"] == "attack":
        shadow = {"do": "train", "model": piece["model"], "length": 1, "pair": shadow_of(piece)}
        if json.dumps(shadow) not in done:
            return False
        needs = [piece["model"]]
    elif piece["do"] == "measure":
        needs = ["pmp", piece["model"]]
    elif piece["do"] == "train" and piece["model"] != "pmp":
        needs = ["pmp"]
    elif piece["do"] == "tune":
        needs = [name for name in ARMS[piece["arm"]] if name in MODELS]
        guess = {"do": "attack", "model": "pmp", "pair": piece["pair"]}
        if piece["arm"] == "guessed mask" and json.dumps(guess) not in done:
            return False
    elif piece["do"] == "glue":
        needs = [piece["model"]]
    length = piece.get("length", 1)
    models = [{"do": "train", "model": name, "length": length, "pair": piece["pair"]} for name in needs]
    return all(json.dumps(model) in done for model in models)


def read_results(file):
    """{key as JSON: result}. A line that a kill has torn is no result."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        found[json.dumps(result["key"])] = result
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="a text for pre-training, as pmp.py's --data")
    parser.add_argument("--glue-dir", type=Path, help="GLUE's TSVs, as glue.py's; without it no GLUE")
    parser.add_argument("--out", type=Path, default=Path("out-experiments"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    out, results = args.out, args.out / "study.jsonl"
    (out / "locks").mkdir(parents=True, exist_ok=True)
    (out / "models").mkdir(exist_ok=True)
    text = (out / "text.jsonl").resolve()
    with lock(out / "locks" / "text") as mine:
        if mine and not text.exists():
            prepare_text(args.text, text)
    while True:
        done = read_results(results)
        left = [piece for piece in pieces() if json.dumps(piece) not in done
                and (args.glue_dir or piece["do"] != "glue")]
        if not left:
            break
        began = time.perf_counter()
        for piece in left if text.exists() else ():
            name = "-".join(str(value) for value in piece.values())
            if not ready(piece, done):
                continue
            with lock(out / "locks" / name) as mine:
                if not mine or json.dumps(piece) in read_results(results):
                    continue
                print(f"\n=== {name}", flush=True)
                if piece["do"] == "train":
                    scores = train(piece, text, out)
                elif piece["do"] == "tune":
                    scores = tune(piece, text, out)
                elif piece["do"] == "attack":
                    scores = run_attack(piece, out)
                elif piece["do"] == "measure":
                    folders = [folder_of(out, model, 1, piece["pair"]) for model in (piece["model"], "pmp")]
                    scores = measure_run(*folders, out / "cache")
                else:
                    scores = run_glue(piece, out, args.glue_dir)
                result = {"key": piece, **scores, "seconds": round(time.perf_counter() - began, 1)}
                with open(results, "a") as file:
                    file.write(json.dumps(result) + "\n")
                break
        else:
            time.sleep(5)  # what is left waits for another process


if __name__ == "__main__":
    pmp.command_line(main)
