"""A run's folder: start it, resume it, its checkpoints, and stopping on request.

    OUT/release            for publication
    OUT/log.jsonl          a line for each step
    OUT/private            for its owner alone (0700, files 0600): run.json says what the run is; checkpoint; lock
"""

import hashlib
import json
import os
import signal
from pathlib import Path

from .files import UserError, disk_errors, lock, read_json, remove_partials, write_json
from .parallel import any_rank, from_first, rank
from .safetensors import load_safetensors, save_safetensors


class Folder:
    """The folder of one run. Under torchrun rank 0 owns it, and every rank makes the same calls.

    A context manager: inside the block no other process can use the folder.
    """

    def __init__(self, out):
        """out: path. Raises UserError where it cannot be a run's folder."""
        if not str(out).strip():
            raise UserError("the name of the run's folder is empty: give --out or --resume a name")
        self.out = Path(out)
        self.private = self.out / "private"
        self.release = self.out / "release"
        self.record = self.private / "run.json"
        self.checkpoint = self.private / "checkpoint.safetensors"
        self.log = self.out / "log.jsonl"

    def __enter__(self):
        from_first(self._acquire)
        return self

    def __exit__(self, *error):
        if rank() == 0:
            self._give_back()

    def _acquire(self):
        with disk_errors(self.out):
            self.created = [folder for folder in (self.private, *self.private.parents) if not folder.exists()]
            if self.out.exists() and not self.out.is_dir():
                raise UserError(f"{self.out} is a file: name a folder")
            if self.private.is_symlink() or self.private.exists() and not self.private.is_dir():
                raise UserError(f"{self.private} must be a folder of its own, not a link or a file: remove it")
            if self.log.exists() and not self.log.is_file():
                raise UserError(f"{self.log} must be a file: remove it")
            self.out.mkdir(parents=True, exist_ok=True)
            self.private.mkdir(mode=0o700, exist_ok=True)
            self.private.chmod(0o700)
        self._lock = lock(self.private / "lock")
        if not self._lock.__enter__():
            self._lock.__exit__(None, None, None)
            raise UserError(f"another process is using {self.out}: wait for it, or name another folder")
        remove_partials(self.private)

    def _give_back(self):
        """Give the lock back. A folder that holds no run is left as it was found."""
        if not self.record.exists():
            (self.private / "lock").unlink(missing_ok=True)
            for folder in self.created:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        self._lock.__exit__(None, None, None)

    # ---- what the run is ----

    def check_unused(self):
        """Raise UserError where the folder holds anything."""
        def check():
            if self.record.exists():
                raise UserError(f"{self.out} already holds a run: continue it with --resume {self.out}, or name "
                                "another --out")
            found = [*self.private.iterdir(), *self.out.iterdir()]
            if strange := [path for path in found if path not in (self.private, self.private / "lock")]:
                raise UserError(f"{self.out} is not empty, it holds {strange[0].name}: name another --out")
        from_first(check)

    def write_record(self, record):
        """Write down what the run is, a dict of JSON values, before it begins."""
        if rank() == 0:
            write_json(self.record, record, mode=0o600)

    def read_record(self):
        """The dict of write_record. Raises UserError where there is none."""
        if not from_first(self.record.exists):
            raise UserError(f"{self.out} holds no run to resume (no {self.record}): start one with --out {self.out}")
        return from_first(read_json, self.record)

    # ---- checkpoints ----

    def save(self, tensors, state, identity):
        """Replace the checkpoint. All of it is secret.

        tensors: {name: tensor}; state: {str: str}; identity: dict of JSON values, what the checkpoint belongs to.
        """
        metadata = {**state, "belongs_to": json.dumps(digests(identity))}
        save_safetensors(self.checkpoint, tensors, metadata, mode=0o600)

    def load(self, identity):
        """(tensors, state) of the checkpoint, or ({}, {}) where there is none yet.

        Raises UserError where it is damaged, or belongs to another identity.
        """
        if not from_first(self.checkpoint.exists):
            return {}, {}
        tensors, state = load_safetensors(self.checkpoint)
        theirs = json.loads(state.get("belongs_to", "{}"))
        ours = digests(identity)
        if differing := [key for key in ours if theirs.get(key) != ours[key]]:
            raise UserError(f"{self.checkpoint} belongs to a run with another {differing[0]}: restore {self.record}, "
                            "or start a new run with another --out")
        return tensors, state

    def open_log(self, size):
        """The path of the log, cut to `size` bytes: what came after the checkpoint comes again. None on other ranks."""
        if rank() > 0:
            return None
        with disk_errors(self.log):
            self.log.touch(mode=0o600)
            os.truncate(self.log, min(self.log.stat().st_size, size))
        return self.log


def digests(identity):
    """{key: sha256 of its value}: enough to compare, and it tells no secret."""
    return {key: hashlib.sha256(f"{key} {json.dumps(value)}".encode()).hexdigest() for key, value in identity.items()}


class StopRequest:
    """Inside the block, Ctrl-C and SIGTERM ask for a stop after the current step; the second one ends the process."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, *_):
        self.asked = True
        for number in self.before:
            signal.signal(number, signal.SIG_DFL)

    def __bool__(self):
        """Whether a stop was asked for. All ranks agree, so that they leave after the same step."""
        return any_rank(self.asked)
