"""How fast a training update is, against the strongest thing that one would write instead.

    python experiments/bench.py [--preset tiny] [--batch-size 8]      pre-training, on the CPU or the GPU there is
    python experiments/bench.py --finetune                            glue.py against transformers and peft
    python experiments/bench.py --profile                             where the time of pmp.py goes

Ours is the real program, by its log: reading and waiting are included, checkpoints are not. Each kind runs in a process
of its own, the kinds alternate, and what counts is the ratio of medians, for machines are noisy. A JSON line goes to
results/bench.jsonl.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import torch  # noqa: E402

import glue  # noqa: E402
import pmp  # noqa: E402
from common import autocast, pick_device, pick_dtype  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import build, config_dict, initialise, save_folder  # noqa: E402

PRESETS = pmp.PRESETS
BLOCK = 256  # tokens in a sequence
PRETRAIN = ("pmp.py, rho 0.7", "pmp.py, rho 1.0", "transformers, eager attention", "transformers, sdpa",
            "transformers, fp32, not compiled")
FINETUNE = ("glue.py, full", "transformers, full", "glue.py, lora", "peft, lora")


def synchronize():
    """Wait for what was left to a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate(update, updates, amount, warm=10):
    """`amount` per second: the median of so many updates after the warm ones."""
    spent = []
    for _ in range(warm + updates):
        began = time.perf_counter()
        update()
        synchronize()
        spent.append(time.perf_counter() - began)
    return amount / statistics.median(spent[warm:])


def ours(args, kind):
    """Tokens/s of pmp.py itself, from its log."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, HERE.parent / "pmp.py", *flags(args, kind.split()[-1], f"{out}/run")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(out, "run", "log.jsonl").read_text().splitlines()]
    return lines[-1]["tokens/s"]


def flags(args, rho, out):
    """The flags of a run of pmp.py that is nearly all stage II."""
    values = {"preset": args.preset, "rho": rho, "data": "prose", "batch-size": args.batch_size, "grad-accum": 1,
              "eb-steps": 2, "compile": "on", "steps": args.updates, "val-every": 1000000, "out": out}
    return [f"--{name}={value}" for name, value in values.items()]


def profile(args):
    """Print where the time of pmp.py goes, operation by operation."""
    with tempfile.TemporaryDirectory() as out, torch.profiler.profile() as profiler:
        pmp.main(flags(args, "0.7", f"{out}/run"))
    on = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=on, row_limit=25))


def theirs(args, kind):
    """Tokens/s of the same shape in transformers: no dropout, no cache, fused AdamW, clipping."""
    import transformers

    device = pick_device("auto")
    dtype = "fp32" if "fp32" in kind else pick_dtype("auto", device)
    values = config_dict(build(PRESETS[args.preset][0], "meta")) | {"use_cache": False}
    values |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if values["model_type"] == "gpt2" else {}
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if "eager" in kind else "sdpa", dtype=torch.float32).to(device).train()
    forward = model if "not compiled" in kind else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = torch.randint(config.vocab_size, (args.batch_size, BLOCK), device=device)

    def update():
        with autocast(device, dtype):
            loss = forward(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return rate(update, args.updates, batch.numel())


def finetuning(args, kind):
    """Rows/s of batches of 32 rows of 5 to 128 tokens."""
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    torch.manual_seed(0)
    lengths = torch.randint(5, 129, (32 * args.updates,)).tolist()
    shape = PRESETS[args.preset][0]
    rows = [(torch.randint(shape.vocab_size - 1, (length,)).tolist(), i % 2) for i, length in enumerate(lengths)]
    body = build(shape)
    initialise(body, b"bench")
    method = kind.split()[-1]
    if kind.startswith("glue.py"):
        spent = []
        task = glue.Task("bench", ("text",), "label", ("0", "1"))
        settings = argparse.Namespace(lr=1e-5, epochs=1, batch_size=32, weight_decay=0.01, clip=1.0, limit=None,
                                      lora_rank=8, lora_alpha=16, dtype=dtype)
        glue.finetune(body.to(device), task, {"train": rows, "dev": rows[:32]}, method, 0, settings, device, None,
                      lambda step, steps, seconds, **numbers: spent.append(seconds))
        return 32 / statistics.median(spent[3:])
    import peft
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.train(["a b c"])
        save_folder(folder, body, {name: p.detach() for name, p in body.named_parameters()}, tokenizer, "")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if method == "lora":
        targets = ["c_attn"] if body.model_type == "gpt2" else ["q_proj", "v_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets))
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    batches = iter(glue.group_by_length(lengths, 32, [0, 0]))

    def update():
        chosen = next(batches)
        idx, sizes = glue.pad([rows[i][0] for i in chosen], device)
        mask = torch.arange(idx.size(1), device=device) < sizes[:, None]
        labels = torch.tensor([rows[i][1] for i in chosen], device=device)
        with autocast(device, dtype):
            loss = model(input_ids=idx.masked_fill(~mask, shape.vocab_size - 1), attention_mask=mask.long(),
                         labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return rate(update, args.updates - 3, 32, warm=3)


def hardware():
    """What the numbers were measured on, in words."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(": ")[1] if models else cpu
    device = pick_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    return f"{name}, {pick_dtype('auto', device)}, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--updates", type=int, default=60, help="of each kind in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--finetune", action="store_true", help="measure glue.py")
    parser.add_argument("--profile", action="store_true", help="show where the time of pmp.py goes")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # measure this kind here, and print its rate
    args = parser.parse_args()
    if args.only:
        measure = finetuning if args.finetune else ours if args.only.startswith("pmp.py") else theirs
        return print(json.dumps(measure(args, args.only)))

    if args.profile:
        return profile(args)
    kinds = FINETUNE if args.finetune else PRETRAIN
    rates = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in kinds:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", kind]
            # huge pages, which common.py asks for, are a part of ours that nobody would write into a peer
            pages = "1" if ".py" in kind else "0"
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                                    env={**os.environ, "THP_MEM_ALLOC_ENABLE": pages}).stdout
            rates[kind].append(float(answer.splitlines()[-1]))
            print(f"round {number + 1}: {kind}: {rates[kind][-1]:,.0f}", flush=True)
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    best = {"": max(value for kind, value in medians.items() if kind.startswith("transformers"))}
    if args.finetune:
        best = {"full": medians["transformers, full"], "lora": medians["peft, lora"]}
    ratios = {kind: round(value / best.get(kind.split()[-1], best.get("", 1)), 2) for kind, value in medians.items()}
    result = {"what": "fine-tuning" if args.finetune else "pre-training", "preset": args.preset, "hardware": hardware(),
              "batch": args.batch_size, "unit": "rows/s" if args.finetune else "tokens/s",
              "min, median, max": {kind: [round(f(found)) for f in (min, statistics.median, max)]
                                   for kind, found in rates.items()},
              "over the strongest peer": ratios}
    (HERE / "results").mkdir(exist_ok=True)
    with open(HERE / "results" / "bench.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
