"""Compare runs: the overlap of the masks in stage I, the losses in stage II, and the settings that differ.

    python experiments/plot.py OUT [OUT2 ...]

The table is printed. The picture goes beside the log of the first run, as OUT/run.png. Keep both to yourself: they
show that, and how, a mask was used.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, UserError, command_line, path, read_json, say  # noqa: E402

PLACES = ("out", "cache", "device", "compile", "resume", "save_every", "twin")  # settings that decide no number


def read_run(out):
    """(settings, {stage: {"loss", "val", "iou"…: (steps, values)}}) of a run's folder."""
    settings = read_json(out / "settings.json")
    stages = {"stage I": {}, "stage II": {}}
    for line in (out / "log.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a line that a kill or a full disk has torn
            continue
        for name, value in entry.items():
            if name not in ("stage", "step"):
                steps, values = stages[entry["stage"]].setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return settings, stages


def smooth(values, width=25):
    """The mean over `width` neighbours, fewer at both ends."""
    weights = np.ones(min(width, len(values)))
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


def print_table(runs):
    """The settings in which runs differ, and the last losses of each."""
    settings = {out: found for out, (found, _) in runs.items()}
    names = {name for found in settings.values() for name in found if name not in PLACES}
    differing = [name for name in sorted(names) if len({str(found.get(name)) for found in settings.values()}) > 1]
    rows = [["run", *differing, "loss", "val"]]
    for out, (found, stages) in runs.items():
        losses, values = (stages["stage II"].get(name, ([], [])) for name in ("loss", "val"))
        last = [f"{smooth(losses[1])[-1]:.3f}" if losses[1] else "-", f"{values[1][-1]:.3f}" if values[1] else "-"]
        rows.append([str(out), *(str(found.get(name)) for name in differing), *last])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def draw(runs, file):
    """The picture of all runs, a colour each, the legend beside the curves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(2, 3), layout="constrained")
    for number, (out, (settings, stages)) in enumerate(runs.items()):
        colour = f"C{number % 10}"
        if "iou" in stages["stage I"]:
            left.plot(*stages["stage I"]["iou"], color=colour)
            left.axhline(settings["rho"] / (2 - settings["rho"]), color=colour, linestyle=":", linewidth=1)
        if "loss" in stages["stage II"]:
            steps, losses = stages["stage II"]["loss"]
            right.plot(steps, smooth(losses), color=colour, linewidth=1, alpha=0.5)
        right.plot(*stages["stage II"].get("val", ([], [])), color=colour, marker="o", label=str(out))
    left.set(title="Stage I: overlap of consecutive masks", xlabel="warm-up step", ylabel="IoU", ylim=(0, 1.02))
    left.text(0.98, 0.03, "dotted: two random masks", transform=left.transAxes, ha="right", fontsize=8)
    right.set(title="Stage II: loss in nats", xlabel="update")
    right.plot([], [], color="grey", alpha=0.5, linewidth=1, label="training, mean of 25")
    right.plot([], [], color="grey", marker="o", label="held-out text")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    file.touch()
    file.chmod(0o600)  # as the log that it shows
    figure.savefig(file, dpi=130)


def main():
    parser = Parser("Compare runs: masks in stage I, losses in stage II, and the settings that differ.")
    parser.add_argument("out", nargs="+", type=path, help="folders of runs")
    outs = [Path(out) for out in parser.parse_args().out]
    for out in outs:
        if not (out / "settings.json").exists() or not (out / "log.jsonl").exists():
            raise UserError(f"{out} holds no run: name the --out of one")
    runs = {out: read_run(out) for out in outs}
    print_table(runs)
    draw(runs, outs[0] / "run.png")
    say(f"\ndrawn in {outs[0] / 'run.png'}")


if __name__ == "__main__":
    command_line(main)
