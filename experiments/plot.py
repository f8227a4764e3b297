"""What one or several runs looked like: the overlap of the masks in stage I, and the losses in stage II.

    python experiments/plot.py OUT [OUT2 ...]

The picture goes beside the log of the first run, as OUT/run.png, or OUT/runs.png of several. Where a run's mask is at
hand, its density by layer and kind of matrix is drawn, too. That picture tells an attacker where to look, so it stays
in OUT/private.
"""

import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import numpy as np  # noqa: E402
from pictures import COLOURS, save, subplots  # noqa: E402
from model import FAMILIES, KINDS, parts_by_kind  # noqa: E402
from pmp import load_mask  # noqa: E402
from runtime.console import Parser, command_line, require  # noqa: E402
from runtime.files import open_regular  # noqa: E402
from runtime.huggingface import load_folder  # noqa: E402

STYLES = ("-", "--", ":", "-.")  # one for each run


def read_log(out):
    """{stage: {"step", "loss", "val_loss", "iou"…: arrays}} of a run's log; a line that a kill has torn is left out."""
    with open_regular(Path(out) / "log.jsonl") as file:
        lines = file.read().splitlines()
    stages = {"I": {}, "II": {}}
    for line in lines:
        try:
            entry = json.loads(line)
            stage = stages[entry.pop("stage")]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name in entry:
            stage.setdefault(name, []).append((entry["step"], entry[name]))
    return {stage: {name: np.array(points).T for name, points in found.items()} for stage, found in stages.items()}


def smooth(values, width):
    """The mean over `width` neighbours, shorter at both ends."""
    weights = np.ones(min(width, len(values)))
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


def draw_runs(outs, path):
    """The picture of all runs. Raises UserError where one has no log."""
    logs = {out: read_log(out) for out in outs}
    require(any(log["I"] or log["II"] for log in logs.values()), f"{outs[0]}/log.jsonl has no step yet: run it first")
    figure, (left, right) = subplots(1, 2, figsize=(10, 3.6))
    for style, (out, log) in zip(STYLES * len(outs), logs.items()):
        label = f" ({out})" if len(outs) > 1 else ""
        if "iou" in log["I"]:
            left.plot(*log["I"]["iou"], style, color=COLOURS["ticket"], label="consecutive masks" + label)
            chance = log["I"]["iou_chance"][1][0]
            left.axhline(chance, color=COLOURS["chance"], linestyle=":",
                         label=f"two random masks ({chance:.2f})" if out == outs[0] else None)
        if "loss" in log["II"]:
            steps, loss = log["II"]["loss"]
            right.plot(steps, smooth(loss, 25), style, color=COLOURS["train"], linewidth=1,
                       label="training, mean of 25 updates" + label)
        if "val_loss" in log["II"]:
            right.plot(*log["II"]["val_loss"], style, marker="o", color=COLOURS["validation"],
                       label="validation" + label)
    left.axhline(0.99, color="black", linewidth=0.8, label="threshold of the early bird (0.99)")
    left.set(title="Stage I: overlap of the masks", xlabel="warm-up step", ylabel="IoU", ylim=(0.4, 1.02))
    right.set(title="Stage II: pre-training inside the ticket", xlabel="update", ylabel="loss, nats")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    save(figure, path, mode=0o600)  # as the log that it shows


def draw_density(out):
    """The picture of one run's ticket, layer by kind of matrix, where its mask is at hand."""
    mask_file, path = Path(out) / "private" / "mask.safetensors", Path(out) / "private" / "density.png"
    if not mask_file.exists():
        return
    model = load_folder(Path(out) / "release", FAMILIES)
    masks = load_mask(mask_file, dict(model.named_parameters()))
    layers = len(model.blocks())
    rows = ["embedding", *(f"layer {i}" for i in range(layers)), "top"]
    kept, size = (np.zeros((len(rows), len(KINDS))) for _ in range(2))
    for name, mask in masks.items():
        number = re.search(r"\.(\d+)\.", name)
        for kind, part in parts_by_kind(name, mask):
            row = 1 + int(number[1]) if number else 0 if kind == "embedding" else len(rows) - 1
            kept[row, list(KINDS).index(kind)] += int(part.sum())
            size[row, list(KINDS).index(kind)] += part.numel()
    density = np.where(size > 0, kept / np.maximum(size, 1), np.nan)
    figure, axis = subplots(figsize=(6, 0.4 * len(rows) + 1.6))
    image = axis.imshow(density, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(KINDS)), KINDS, rotation=30)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_title("Private: share of each matrix in the ticket")
    for (row, column), share in np.ndenumerate(density):
        if not np.isnan(share):
            axis.text(column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "black")
    figure.colorbar(image)
    save(figure, path, mode=0o600)


def main(argv=None):
    parser = Parser("Draw one or several runs: overlap of the masks, losses, and the ticket's density.")
    parser.add_argument("out", nargs="+", metavar="OUT", help="folders of runs")
    outs = parser.parse_args(argv).out
    for out in outs:
        require(os.path.isdir(out), f"there is no folder {out}: name the --out of a run")
    draw_runs(outs, Path(outs[0]) / ("run.png" if len(outs) == 1 else "runs.png"))
    for out in outs:
        draw_density(out)


if __name__ == "__main__":
    command_line(main)
