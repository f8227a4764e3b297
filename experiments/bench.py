"""How fast it is, and what the mask costs: every speed in SPEED.md comes from here.

    python experiments/bench.py [--preset tiny] [--rounds 15]

Machines are noisy, so what is compared alternates inside one process and the result is a ratio of medians. One JSON
line goes to experiments/results/bench.jsonl. Where transformers is installed, the same shape is trained with it too: in
fp32 and eager, as most people start, and with bf16, torch.compile and a fused AdamW, which is the strongest.

    python experiments/bench.py --finetune             rows/s of glue.py and of the same loop with transformers and peft
    python experiments/bench.py --data TEXT.jsonl.xz   MB/s of tokenizing and packing a file
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import glue  # noqa: E402
from store import hardware  # noqa: E402
from data.pack import prepare  # noqa: E402
from data.sources import open_source  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from model import build, initialise  # noqa: E402
from pmp import PRESETS, Config, EarlyBird, MaskedAdamW, random_mask, topk_mask  # noqa: E402
from runtime.console import Parser, command_line  # noqa: E402
from runtime.files import Results  # noqa: E402
from runtime.huggingface import config_to_dict, save_folder  # noqa: E402
from runtime.machine import Machine  # noqa: E402
from runtime.training import timed  # noqa: E402


def alternate(tasks, rounds, warm=2):
    """{name: seconds of each round} of {name: function}, in turn, so that a slow minute hits all of them."""
    seconds = {name: [] for name in tasks}
    for number in range(warm + rounds):
        for name, task in tasks.items():
            spent = timed(task)
            if number >= warm:
                seconds[name].append(spent)
    return seconds


def trainer(model, machine, batch, masks=None, bird=None):
    """A function that makes one whole update of batch (B, T), as pmp.py does; with an EarlyBird, one of stage I."""
    params = dict(model.named_parameters())
    optimizer = MaskedAdamW(params, masks, 0.1)
    k = int(0.7 * sum(p.numel() for p in params.values()))

    def update():
        with machine.autocast():
            loss = model(batch, batch)
        loss.backward()
        if bird:
            bird.see(topk_mask({name: p.grad for name, p in params.items()}, k))
        optimizer.step(1e-4, clip=1.0)
    return update


def transformers_trainer(model, batch, machine=None):
    """The same shape and batch in transformers: fp32 and eager, or, with a machine, in its precision and compiled."""
    import transformers

    written = config_to_dict(model.config, model.model_type)
    values = {key: value for key, value in written.items() if key not in ("architectures", "torch_dtype")}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).to(batch.device)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=bool(machine))
    forward = torch.compile(theirs) if machine else theirs

    def update():
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bool(machine) and machine.dtype == "bf16"):
            loss = forward(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


def matmul_rate(machine, repeats=10):
    """FLOP/s of this machine for a large square product in its training precision, the best of several."""
    size = 2048 if machine.device.type == "cpu" else 8192
    dtype = torch.bfloat16 if machine.dtype == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=machine.device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(alternate({"mm": lambda: a @ b}, repeats)["mm"])


def early_bird(entries, rounds, device):
    """Seconds of our exact top-k and of torch.topk on the concatenation, at rho 0.7 and the same choice."""
    scores = {str(i): torch.randn(entries // 10, device=device) for i in range(10)}
    k = int(0.7 * entries)

    def by_sorting():
        return torch.topk(torch.cat([score.abs().flatten() for score in scores.values()]), k).values

    chosen = [score.abs()[mask] for score, mask in zip(scores.values(), topk_mask(scores, k).values())]
    assert sum(map(len, chosen)) == k and min(part.min() for part in chosen) == by_sorting().min()  # but for ties
    return alternate({"ours": lambda: topk_mask(scores, k), "torch.topk": by_sorting}, rounds, warm=0)


def finetuning(machine, shape, rounds):
    """rows/s of eight updates of 32 rows with each method, ours and transformers', on the same batches."""
    import peft
    import transformers

    rng = np.random.default_rng(0)
    lengths = rng.normal(45, 25, 1600).clip(5, 128).astype(int)
    rows = [(rng.integers(shape.vocab_size, size=length).tolist(), int(rng.integers(2))) for length in lengths]
    body = build(shape)
    initialise(body, b"bench")
    params, settings = dict(body.named_parameters()), glue.Settings()
    masks = random_mask(params, int(0.7 * sum(p.numel() for p in params.values())), b"bench")
    batches = glue.group_by_length(lengths.tolist(), 32, [0, 0])[:8]

    def ours(method, masks=None):
        model, trained, masks = glue.prepare_model(copy.deepcopy(body), method, 2, masks, 0, settings)
        task = glue.Rows(model.to(machine.device), "rte", {"train": rows}, 0, settings, machine)
        optimizer = MaskedAdamW(trained, masks, settings.weight_decay, (0.9, 0.999))

        def updates():
            for chosen in batches:
                with machine.autocast():
                    loss = task.loss(chosen)
                loss.backward()
                optimizer.step(1e-5, 1.0)
        return updates

    def theirs(method, bf16):
        with tempfile.TemporaryDirectory() as folder:
            save_folder(folder, body)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        if method == "lora":
            targets = ["c_attn"] if body.model_type == "gpt2" else ["q_proj", "v_proj"]
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets))
        model.to(machine.device).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=bf16)

        def updates():
            for chosen in batches:
                idx, lengths = glue.pad([rows[i][0] for i in chosen], machine.device)
                mask = torch.arange(idx.size(1), device=machine.device) < lengths[:, None]
                labels = torch.tensor([rows[i][1] for i in chosen], device=machine.device)
                with torch.autocast(machine.device.type, torch.bfloat16, enabled=bf16):
                    loss = model(input_ids=idx.masked_fill(~mask, shape.vocab_size - 1), attention_mask=mask.long(),
                                 labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return updates

    tasks = {}
    for method in ("full", "lora"):
        tasks |= {method: ours(method), f"{method} + mask": ours(method, masks),
                  f"transformers, {method}, fp32": theirs(method, False),
                  f"transformers, {method}, bf16, fused": theirs(method, True)}
    median = {name: statistics.median(values) for name, values in alternate(tasks, rounds).items()}
    count = sum(map(len, batches))
    return {"rows_per_s": {name: round(count / value) for name, value in median.items()},
            "times_faster": {method: {name: round(value / median[method], 2) for name, value in median.items()
                                      if name.startswith("transformers") and method in name}
                             for method in ("full", "lora")}}


def packing(path):
    """MB/s of preparing a text file with GPT-2's tokenizer in a fresh cache, and tiktoken's share of the time."""
    spent = [0.0]

    def counted(tokenizer, texts, encode=Tokenizer.encode_many):
        began = time.perf_counter()
        ids = encode(tokenizer, texts)
        spent[0] += time.perf_counter() - began
        return ids

    with tempfile.TemporaryDirectory() as cache, mock.patch.object(Tokenizer, "encode_many", counted):
        began = time.perf_counter()
        _, train, _ = prepare(path, "gpt2", 10**12, cache=cache)
        while not train.file.state["done"]:
            train.stream.want(10**12)
            time.sleep(0.05)
        seconds = time.perf_counter() - began
    size = sum(len(text.encode()) for _, text in open_source(path).documents("train")) / 1e6
    return {"mb": round(size, 1), "mb_per_s": round(size / seconds, 1), "tokenizer_share": round(spent[0] / seconds, 2)}


def peak_memory(preset, masked):
    """Bytes a parameter that two updates (of one short sequence, so that activations stay small) add at their peak to a
    fresh process."""
    machine = Machine("cpu")
    torch.randn(500, 500) @ torch.randn(500, 500)  # libraries load before the count begins
    before = resident("VmRSS")
    model = build(PRESETS[preset].shape)
    initialise(model, b"bench")
    params = dict(model.named_parameters())
    d = sum(p.numel() for p in params.values())
    masks = random_mask(params, int(0.7 * d), b"bench") if masked else None
    update = trainer(model, machine, torch.zeros(1, 32, dtype=torch.long), masks)
    for _ in range(2):
        update()
    print(json.dumps(round((resident("VmHWM") - before) / d, 2)))


def resident(key):
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="timed updates of each kind")
    parser.add_argument("--entries", type=int, default=100_000_000, help="gradient entries in the EarlyBird timing")
    parser.add_argument("--finetune", action="store_true", help="measure fine-tuning alone")
    parser.add_argument("--data", help="measure tokenizing and packing of this text file alone")
    parser.add_argument("--memory", choices=("dense", "masked"), help="measure memory alone, in this process")
    args = parser.parse_args()
    if args.memory:
        return peak_memory(args.preset, args.memory == "masked")
    (HERE / "results").mkdir(exist_ok=True)
    results = Results(HERE / "results" / "bench.jsonl")
    if args.finetune or args.data:
        found = packing(args.data) if args.data else finetuning(Machine(), PRESETS[args.preset].shape, args.rounds)
        what = "packing text" if args.data else f"fine-tuning {args.preset}"
        result = {"what": what, "hardware": hardware(Machine()), **found}
        results.append(result)
        return print(json.dumps(result, indent=2))

    machine, shape = Machine(), PRESETS[args.preset].shape
    batch = torch.randint(shape.vocab_size, (args.batch_size, Config.block_size), device=machine.device)
    model = build(shape).to(machine.device)
    initialise(model, b"bench")
    params = dict(model.named_parameters())
    d = sum(p.numel() for p in params.values())
    masks = random_mask(params, int(0.7 * d), b"bench")
    notes = []

    def compiled():
        """A copy of the model, compiled: a copy of a compiled one would not be."""
        fresh = copy.deepcopy(model)
        machine.compile(fresh, batch, notes.append)
        return fresh

    updates = {
        "dense, eager": trainer(copy.deepcopy(model), machine, batch),
        "masked, eager": trainer(copy.deepcopy(model), machine, batch, masks),
        "dense, compiled": trainer(compiled(), machine, batch),
        "masked, compiled": trainer(compiled(), machine, batch, masks),
        "EarlyBird, compiled": trainer(compiled(), machine, batch, bird=EarlyBird(0.99, 5)),
    }
    try:
        updates["transformers, fp32, eager"] = transformers_trainer(model, batch)
        updates["transformers, compiled, fused"] = transformers_trainer(model, batch, machine)
    except ImportError:
        notes.append("transformers is not installed")
    seconds = alternate(updates, args.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens, rate = batch.numel(), matmul_rate(machine)
    ticket = early_bird(args.entries, 3, machine.device)
    best = median["masked, compiled"]
    result = {
        "preset": args.preset, "parameters": d, "tokens_per_update": tokens, "hardware": hardware(machine),
        "notes": notes, "rounds": args.rounds,
        "tokens_per_s": {name: round(tokens / value) for name, value in median.items()},
        "spread": {name: [round(tokens / max(values)), round(tokens / min(values))]
                   for name, values in seconds.items()},
        "matmul_gflops": round(rate / 1e9),
        "mfu": {name: round(model.flops_per_token(Config.block_size) * tokens / value / rate, 3)
                for name, value in median.items()},
        "masked_over_dense_time": round(best / median["dense, compiled"], 3),
        "early_bird_over_dense_time": round(median["EarlyBird, compiled"] / median["dense, compiled"], 3),
        "masked_times_faster_than": {name: round(value / best, 2) for name, value in median.items()
                                     if name.startswith("transformers")},
        "peak_bytes_per_parameter": {kind: json.loads(subprocess.run(
            [sys.executable, __file__, "--preset", args.preset, "--memory", kind], capture_output=True, text=True,
            check=True).stdout) for kind in ("dense", "masked")},
        "topk_entries": args.entries,
        "topk_s": {name: round(statistics.median(values), 3) for name, values in ticket.items()},
    }
    results.append(result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    command_line(main)
