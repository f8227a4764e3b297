"""The results: results/SCALE/KIND.jsonl, one a line. run.py claims jobs and appends; all others only read."""

import json
import os
import platform
from pathlib import Path

import torch
from plan import HERE, SCALES

from runtime.files import Results as Lines


class Results:
    """The results of one scale."""

    def __init__(self, scale, folder=HERE / "results"):
        """scale: its name; folder: where the results of all scales lie."""
        self.name, self.scale = scale, SCALES[scale]
        self.folder = Path(folder) / scale
        self.versions, self.found = {}, {}
        self.memo = {}  # what plan.py has made of them

    def refresh(self):
        """Read what other processes have added. Raises UserError where a file is damaged."""
        for path in sorted(self.folder.glob("*.jsonl")):
            version = path.stat().st_size, path.stat().st_mtime_ns
            if self.versions.get(path) != version:
                for result in Lines(path).read():
                    self.found[path.stem, json.dumps(result["key"], sort_keys=True)] = result
                self.versions[path] = version
                self.memo.clear()
        return self

    def get(self, job):
        """The result of a Job, or None."""
        return job and self.found.get((job.kind, job.key))

    def lines(self, job):
        """The file of a Job's results."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Lines(self.folder / f"{job.kind}.jsonl")

    def claim(self, job):
        """Claim a Job, as a context manager: True, or False where another process is at it."""
        return self.lines(job).claim(job.key)

    def append(self, job, result):
        self.lines(job).append({"key": json.loads(job.key), **result})
        self.found[job.kind, job.key] = {"key": json.loads(job.key), **result}
        self.memo.clear()


def hardware(machine=None):
    """One line about this machine, for each result."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
        name = names[0] if names else name
    if machine and machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
    kind = f" {machine.device.type} {machine.dtype}" if machine else ""
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads,{kind} torch {torch.__version__}"
