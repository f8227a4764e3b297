"""How fast it is, and what the mask costs: every speed in README comes from here.

    python experiments/bench.py [--preset tiny] [--rounds 7]

Machines are noisy, so what is compared alternates inside one process and the result is a ratio of medians. One JSON
line goes to experiments/results/bench.jsonl. Where transformers is installed, the same shape is trained with it too.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import hardware  # noqa: E402
from model import PRESETS, build, config_to_dict, initialise  # noqa: E402
from pmp import Config, Machine, MaskedAdamW, random_mask, topk_mask  # noqa: E402


def alternate(tasks, rounds, warm=2):
    """{name: seconds of each round} of {name: function}, in turn, so that a slow minute hits all of them."""
    seconds = {name: [] for name in tasks}
    for number in range(warm + rounds):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def trainer(model, machine, optimizer, batch):
    """A function that makes one whole update of batch (B, T), as pmp.py does."""
    def update():
        with machine.autocast():
            loss = model(batch, batch)
        loss.backward()
        optimizer.step(1e-4, clip=1.0)
    return update


def transformers_trainer(config, batch):
    """The same shape and batch in transformers, in fp32 and eager, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    given = config_to_dict(config).items()
    values = {key: value for key, value in given if key not in ("architectures", "torch_dtype")}
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).to(batch.device)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4)

    def update():
        theirs(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


def flops_per_token(model, config):
    """Training: 6 per parameter in a matrix product, plus attention's scores and sums (Chowdhery et al., 2022)."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    layers, width = len(model.blocks()), model.lm_head.weight.size(1)
    return 6 * matrices + 12 * layers * width * Config.block_size / 2  # causal: half of all pairs


def matmul_rate(machine, size=2048, repeats=10):
    """FLOP/s of this machine for a square product in its training precision, the best of several."""
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


def peak_memory(preset, masked):
    """Bytes a parameter that two updates (of one short sequence, so that activations stay small) add at their peak to a
    fresh process, and those of the tensors that training keeps."""
    machine, config = Machine("cpu"), PRESETS[preset]
    torch.randn(500, 500) @ torch.randn(500, 500)  # libraries load before the count begins
    before = resident("VmRSS")
    model = build(config)
    initialise(model, b"bench")
    params = dict(model.named_parameters())
    d = sum(p.numel() for p in params.values())
    masks = random_mask(params, int(0.7 * d), b"bench") if masked else None
    optimizer = MaskedAdamW(params, masks, 0.1)
    batch = torch.zeros(1, 32, dtype=torch.long)
    for _ in range(2):
        with machine.autocast():
            loss = model(batch, batch)
        loss.backward()
        kept = sum(p.nbytes + p.grad.nbytes for p in params.values())
        optimizer.step(1e-4, clip=1.0)
    kept += sum(tensor.nbytes for tensor in optimizer.state().values()) + sum(m.nbytes for m in (masks or {}).values())
    print(json.dumps({"kept": round(kept / d, 2), "peak": round((resident("VmHWM") - before) / d, 2)}))


def resident(key):
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="timed updates of each kind")
    parser.add_argument("--entries", type=int, default=100_000_000, help="gradient entries in the EarlyBird timing")
    parser.add_argument("--memory", choices=("dense", "masked"), help="measure memory alone, in this process")
    args = parser.parse_args()
    if args.memory:
        return peak_memory(args.preset, args.memory == "masked")

    machine, config = Machine(), PRESETS[args.preset]
    batch = torch.randint(config.vocab_size, (args.batch_size, Config.block_size), device=machine.device)
    dense = build(config).to(machine.device)
    initialise(dense, b"bench")
    masked, compiled = copy.deepcopy(dense), copy.deepcopy(dense)
    params = {name: dict(model.named_parameters()) for name, model in
              (("dense", dense), ("masked", masked), ("compiled", compiled))}
    d = sum(p.numel() for p in params["dense"].values())
    masks = random_mask(params["masked"], int(0.7 * d), b"bench")
    compiled_works = []
    machine.compile(compiled, batch, compiled_works.append)
    updates = {
        "dense": trainer(dense, machine, MaskedAdamW(params["dense"], None, 0.1), batch),
        "masked": trainer(masked, machine, MaskedAdamW(params["masked"], masks, 0.1), batch),
        "compiled": trainer(compiled, machine, MaskedAdamW(params["compiled"], None, 0.1), batch),
        "transformers": transformers_trainer(config, batch),
    }
    seconds = alternate({name: update for name, update in updates.items() if update}, args.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = batch.numel()
    rate = matmul_rate(machine)
    ticket = early_bird(args.entries, 3, machine.device)
    result = {
        "preset": args.preset, "parameters": d, "tokens_per_update": tokens, "device": str(machine.device),
        "dtype": machine.dtype, "compile_note": compiled_works, "hardware": hardware(machine),
        "rounds": args.rounds,
        "tokens_per_s": {name: round(tokens / value) for name, value in median.items()},
        "spread": {name: [round(tokens / max(values)), round(tokens / min(values))]
                   for name, values in seconds.items()},
        "masked_over_dense_time": round(median["masked"] / median["dense"], 4),
        "matmul_gflops": round(rate / 1e9),
        "mfu": {name: round(flops_per_token(dense, config) * tokens / value / rate, 3)
                for name, value in median.items()},
        "bytes_per_parameter": {kind: json.loads(subprocess.run(
            [sys.executable, __file__, "--preset", args.preset, "--memory", kind], capture_output=True, text=True,
            check=True).stdout) for kind in ("dense", "masked")},
        "early_bird_entries": args.entries,
        "early_bird_s": {name: round(statistics.median(values), 3) for name, values in ticket.items()},
        "early_bird_speedup": round(statistics.median(ticket["torch.topk"]) / statistics.median(ticket["ours"]), 1),
    }
    if "transformers" in median:
        result["over_transformers"] = {name: round(median["transformers"] / value, 2) for name, value in median.items()}
    (HERE / "results").mkdir(exist_ok=True)
    with open(HERE / "results" / "bench.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
