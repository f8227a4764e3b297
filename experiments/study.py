"""The study: train the models of PROTOCOL.md, tune them, and write a line of JSON for each result.

    python experiments/study.py --text FILE --out out-experiments      start it once for each core

Each process takes the next job that is ready and that no other process is at. Training that was stopped goes on where
it was, and so does GLUE after its last finished run; every other job starts again. The lines are in OUT/study.jsonl and
OUT/glue.jsonl; report.py makes the tables of them. Every model is trained by pmp.py, and every task by `pmp.py --init`
or glue.py, with their own flags. What this file adds is the list of jobs, `evaluate`, and the noise of `noisy`.
"""

import json
import random
import secrets
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import glue  # noqa: E402
import pmp  # noqa: E402
from attack import attack, judge as judge_guess  # noqa: E402
from common import (Parser, UserError, atomic, autocast, command_line, fingerprint, lock, path, pick_dtype,  # noqa: E402
                    say)
from data.text import all_documents, documents, prepare  # noqa: E402
from measure import measure_run  # noqa: E402
from model import load_folder  # noqa: E402

LONGEST_DOCUMENT = 4000  # characters: a longer document is cut, so that none fills an update
TEXT = 150_000_000  # characters: the copy ends with the document that passes this. Ten tokens a parameter need 108M
STEPS = 1560  # of 8 x 256 tokens: 3.19M, one a parameter of mini-untied
PAIRS = range(8)  # models with the same number share theta(0), the order of the text, and the settings
LENGTHS, LONG_PAIRS = (1, 3, 10), range(4)  # tokens a parameter, and the pairs that are trained longer than one
RATES = (1, 2, 4, 8, 16)  # times BASE_RATE
BASE_RATE = 2e-4  # glue.py's rate for this width, 5e-5 * 768 / 192
TUNING = ["--steps", "64", "--batch-size", "8", "--block-size", "128", "--val-every", "64", "--val-blocks", "1",
          "--save-every", "64", "--compile", "off", "--device", "cpu"]
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
    "noisy": ["--rho", "0.7"],  # a countermeasure: the scores of the ticket are multiplied with secret noise
}
NOISE = 2.0  # standard deviation of the logarithm of that noise; that of |gradient| is about as large


def trained(model, pair, length=1):
    """The key of a model. length: tokens a parameter."""
    return {"do": "train", "model": model, "length": length, "pair": pair}


def tunings(arm, pair, length=1):
    """The keys of one arm: all rates, and two orders of the text."""
    for rate in RATES:
        for seed in (0, 1):
            yield {"do": "tune", "arm": arm, "length": length, "pair": pair, "rate": rate, "seed": seed}


def jobs():
    """All jobs in the order in which they are done, each a dict that is its key in the results."""
    for pair in PAIRS:
        for model in ("pmp", "dense", "random"):
            yield trained(model, pair)
        for arm in ("outsider", "dense", "authorised", "dense in the mask", "random"):
            yield from tunings(arm, pair)
    for pair in PAIRS:
        yield {"do": "attack", "model": "pmp", "pair": pair}
        if pair < 4:
            yield {"do": "measure", "model": "pmp", "pair": pair}
            yield {"do": "measure", "model": "dense", "pair": pair}
        yield from tunings("guessed mask", pair)
    for pair in (0, 1, 2):
        for model, mask in (("dense", False), ("pmp", False), ("pmp", True)):
            for task in ("cola", "rte", "sst2"):
                yield {"do": "glue", "model": model, "mask": mask, "task": task, "pair": pair}
    for pair in range(3):
        yield trained("noisy", pair)
    for pair in range(3):
        yield {"do": "attack", "model": "noisy", "pair": pair}
        yield {"do": "attack", "model": "random", "pair": pair}
    for pair in PAIRS:
        yield trained("matched", pair)
        yield from tunings("matched", pair)
    for length in LENGTHS[1:]:
        for pair in LONG_PAIRS:
            for model in ("pmp", "dense"):
                yield trained(model, pair, length)
            for arm in ("outsider", "dense", "authorised"):
                yield from tunings(arm, pair, length)


def shadow_of(job):
    """The pair whose run is the attacker's: another secret, and another order of the text."""
    pairs = 3 if job["model"] == "noisy" else len(PAIRS)
    return (job["pair"] + 1) % pairs


def needs(job):
    """The jobs that a job builds on. All models of a pair build on its PMP model."""
    pair, length = job["pair"], job.get("length", 1)
    if job["do"] == "train":
        return [] if job["model"] == "pmp" else [trained("pmp", pair, length)]
    if job["do"] == "tune":
        model, mask = ARMS[job["arm"]]
        if mask == "guess":
            return [trained(model, pair, length), {"do": "attack", "model": "pmp", "pair": pair}]
        return [trained(model, pair, length)]
    if job["do"] == "attack":
        return [trained(job["model"], pair), trained(job["model"], shadow_of(job))]
    return [trained(job["model"], pair)]


# ---- the work ------------------------------------------------------------------------------------------------------


def prepare_text(source, target):
    """Write the text of the study: long documents are cut, and all are shuffled."""
    if source == "slimpajama":
        texts = (text for _, text in documents(source, "train"))
    else:
        texts = all_documents(source)
    cut, size = [], 0
    for text in texts:
        for start in range(0, len(text), LONGEST_DOCUMENT):
            cut.append(text[start:start + LONGEST_DOCUMENT])
        size += len(text)
        if size > TEXT:
            break
    if not cut:
        raise UserError(f"{source} holds no text: name a file with documents in it")
    random.Random(0).shuffle(cut)
    with atomic(target) as file:
        for text in cut:
            file.write(json.dumps({"text": text}).encode() + b"\n")


@torch.no_grad()
def evaluate(model, tokens, dtype, blocks=128, block_size=256):
    """{"loss": nats, "accuracy": percent} of the next token, over the first `blocks` held-out blocks."""
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


def folder_of(out, model, pair, length=1):
    return out / "models" / f"{model}-{length}-{pair}"


def mask_of(out, pair, length=1):
    return folder_of(out, "pmp", pair, length) / "private" / "mask.safetensors"


def guess_of(out, pair):
    return out / "models" / f"guess-{pair}.safetensors"


def parameters(release):
    return dict(load_folder(release)[0].named_parameters())


def noisy(topk_mask):
    """A topk_mask whose scores are multiplied with noise that nobody else knows. A run that resumes draws new noise."""
    generator, noise = np.random.default_rng(secrets.randbits(128)), {}

    def noisy_topk_mask(scores, k):
        for name, score in scores.items():
            if name not in noise:
                normal = generator.standard_normal(tuple(score.shape), np.float32)
                noise[name] = torch.from_numpy(np.exp(NOISE * normal))
        return topk_mask({name: score.abs() * noise[name] for name, score in scores.items()}, k)

    return noisy_topk_mask


def train(job, text, out):
    """Pre-train a model. Returns its scores and the fingerprint of its weights."""
    model, pair, length = job["model"], job["pair"], job["length"]
    folder = folder_of(out, model, pair, length)
    argv = ["--out", str(folder), "--cache", str(out / "cache"), "--resume", "--compile", "on"]
    if model == "pmp":
        argv += ["--preset", "mini-untied", "--data", str(text), "--seed", str(pair), "--batch-size", "8", "--steps",
                 str(STEPS * length), "--val-every", "400", "--save-every", "400", "--device", "cpu"]
    else:
        argv += ["--twin", str(folder_of(out, "pmp", pair, length))]
    torch._dynamo.reset()  # another model: what was compiled is of no use
    topk_mask = pmp.topk_mask
    if model == "noisy":
        pmp.topk_mask = noisy(topk_mask)
    try:
        pmp.main(argv + MODELS[model])
    finally:
        pmp.topk_mask = topk_mask
    return {**judge(folder / "release", text, out / "cache"), "weights": fingerprint(parameters(folder / "release"))}


def tune(job, text, out, folder):
    """Go on from a release with documentation, in `folder`. Returns the scores of the tuned model."""
    model, mask = ARMS[job["arm"]]
    pair, length = job["pair"], job["length"]
    release = folder_of(out, model, pair, length) / "release"
    argv = ["--init", str(release), "--data", "prose", "--out", str(folder / "tuned"), "--cache", str(out / "cache"),
            "--seed", str(job["seed"]), "--lr", str(BASE_RATE * job["rate"]), *TUNING]
    if mask == "guess":
        argv += ["--mask", str(guess_of(out, pair))]
    elif mask:  # a mask's file belongs to one release: make one for this release
        masks = pmp.load_mask(mask_of(out, pair, length), parameters(folder_of(out, "pmp", pair, length) / "release"))
        pmp.save_mask(folder / "mask", masks, parameters(release))
        argv += ["--mask", str(folder / "mask")]
    pmp.main(argv)
    return judge(folder / "tuned" / "release", text, out / "cache")


def run_attack(job, out):
    """Guess the mask of a release with the shadow of another pair. Returns how much of it was found."""
    victim = folder_of(out, job["model"], job["pair"])
    model, tokenizer = load_folder(victim / "release")
    scores, k = attack(model, tokenizer, [folder_of(out, job["model"], shadow_of(job))], out / "cache")
    params = dict(model.named_parameters())
    if job["model"] == "pmp":
        pmp.save_mask(guess_of(out, job["pair"]), pmp.topk_mask(scores["classifier"], k), params)
    return judge_guess(scores, pmp.load_mask(victim / "private" / "mask.safetensors", params), k)


def run_glue(job, out, glue_dir):
    """Fine-tune on a task of GLUE. glue.py writes the lines itself, into OUT/glue.jsonl."""
    folder = folder_of(out, job["model"], job["pair"])
    argv = [str(folder / "release"), "--glue-dir", str(glue_dir), "--tasks", job["task"], "--seed",
            str(job["pair"]), "--results", str(out / "glue.jsonl"), "--device", "cpu"]
    if job["task"] == "sst2":
        argv += ["--limit", "10000"]
    if job["mask"]:
        argv += ["--mask", str(mask_of(out, job["pair"]))]
    glue.main(argv)
    return {}


def work(job, args, text):
    """Do a job. Returns its result."""
    out, folder = args.out, args.out / "tuning" / name_of(job)
    began = time.perf_counter()
    if job["do"] == "train":
        scores = train(job, text, out)
    elif job["do"] == "tune":
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir(parents=True)
        scores = tune(job, text, out, folder)
        shutil.rmtree(folder)
    elif job["do"] == "attack":
        scores = run_attack(job, out)
    elif job["do"] == "measure":
        folders = [folder_of(out, model, job["pair"]) for model in (job["model"], "pmp")]
        scores = measure_run(*folders, out / "cache")
    else:
        scores = run_glue(job, out, args.glue_dir)
    return {"key": job, **scores, "seconds": round(time.perf_counter() - began, 1)}


def name_of(job):
    return "-".join(str(value).replace(" ", "-") for value in job.values())


def read_results(file):
    """{key as JSON: result} of a file's lines, the last of each key. A line that a kill has torn is no result."""
    found = {}
    if file.exists():
        for line in file.read_text().splitlines():
            try:
                result = json.loads(line)
                found[json.dumps(result["key"])] = result
            except ValueError:
                pass
    return found


def main():
    parser = Parser("Train and tune the models of PROTOCOL.md. Start it once for each core.")
    parser.add_argument("--text", type=path, required=True, help="a text for pre-training, as pmp.py's --data; it is "
                        "copied at the first start")
    parser.add_argument("--glue-dir", type=path, help="GLUE's TSVs, as glue.py's; without it no GLUE")
    parser.add_argument("--out", type=path, default="out-experiments", help="[out-experiments]")
    args = parser.parse_args()
    args.out = Path(args.out)
    if args.glue_dir and not Path(args.glue_dir).is_dir():
        raise UserError(f"there is no folder {args.glue_dir}: name the one with GLUE's TSVs")
    torch.set_num_threads(1)
    results, text = args.out / "study.jsonl", (args.out / "text.jsonl").resolve()
    for folder in ("locks", "models"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    if text.exists():
        say(f"the text is {text}, copied at the first start; --text is not read again")
    elif results.exists():
        raise UserError(f"{text} is gone, and the lines of {results} were made with it: put it back, or name another "
                        "--out")
    while not text.exists():
        with lock(args.out / "locks" / "text") as mine:
            if mine and not text.exists():
                prepare_text(args.text, text)
        time.sleep(1)
    failed = []
    while True:
        done, left, given_up = read_results(results), [], list(failed)
        for job in jobs():
            if any(need in given_up for need in needs(job)):
                given_up.append(job)
            elif json.dumps(job) not in done and job not in failed and (args.glue_dir or job["do"] != "glue"):
                left.append(job)
        if not left:
            break
        for job in left:
            if not all(json.dumps(need) in done for need in needs(job)):
                continue
            with lock(args.out / "locks" / name_of(job)) as mine:
                if not mine or json.dumps(job) in read_results(results):
                    continue
                say(f"\n=== {name_of(job)}")
                try:
                    glue.append_result(results, work(job, args, text))
                except (UserError, FileNotFoundError) as error:
                    say(f"failed: {error}")
                    failed.append(job)
                break
        else:
            time.sleep(5)  # what is left waits for another process
    if failed:
        raise UserError(f"{len(failed)} jobs failed, the first of them {name_of(failed[0])}: see above")


if __name__ == "__main__":
    command_line(main)
