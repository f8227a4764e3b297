"""A run's folder: start it, resume it, its checkpoints, and stopping on request.

    OUT/release            for publication
    OUT/log.jsonl          a line for each step
    OUT/private            for its owner alone (0700, files 0600): run.json says what the run is; checkpoint; lock
"""

import hashlib
import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

from .files import UserError, disk_errors, is_name, lock, parse_json, read_json, remove_partials, write_json
from .parallel import any_rank, from_first, rank
from .safetensors import load_safetensors, save_safetensors


class Folder:
    """The folder of one run. Under torchrun rank 0 owns it, and every rank makes the same calls.

    A context manager: inside the block no other process can use the folder.
    """

    def __init__(self, out):
        """out: path. Raises UserError where it cannot be a run's folder."""
        if not is_name(str(out)):
            raise UserError("the name of the run's folder is empty or none: give --out or --resume a name")
        self.out = Path(out)
        self.private = self.out / "private"
        self.release = self.out / "release"
        self.record = self.private / "run.json"
        self.checkpoint = self.private / "checkpoint.safetensors"
        self.log = self.out / "log.jsonl"
        self.lock = self.private / "lock"

    def __enter__(self):
        from_first(self._acquire)
        return self

    def __exit__(self, *error):
        if rank() == 0:
            self._undo.close()

    def _acquire(self):
        with ExitStack() as undo:
            with disk_errors(self.out):
                self._check_kinds()
                self.created = [path for path in (self.lock, *self.lock.parents) if not os.path.lexists(path)]
                undo.callback(self._remove_created)
                self.out.mkdir(parents=True, exist_ok=True)
                self.private.mkdir(mode=0o700, exist_ok=True)
                if self.private in self.created or self.record.exists():  # and not somebody else's folder
                    self.private.chmod(0o700)
            if not undo.enter_context(lock(self.lock)):
                self.created = []  # the other process needs them
                raise UserError(f"another process is using {self.out}: wait for it, or name another folder")
            undo.callback(self._remove_created)  # again, and then before the lock is given back
            remove_partials(self.private)
            remove_partials(self.release)
            self._undo = undo.pop_all()

    def _check_kinds(self):
        """Raise UserError where a link could lead what is written elsewhere, or a file stands where a folder must."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is a file: name a folder")
        for path, fits, kind in ((self.private, Path.is_dir, "folder"), (self.release, Path.is_dir, "folder"),
                                 (self.log, Path.is_file, "file")):
            if path.is_symlink() or path.exists() and not fits(path):
                raise UserError(f"{path} must be a {kind} of its own, not a link or anything else: remove it")

    def _remove_created(self):
        """Leave a folder that holds no run as it was found."""
        for path in self.created if not os.path.exists(self.record) else ():
            if path == self.lock and os.path.lexists(path):
                path.unlink()
            elif os.path.isdir(path) and not any(path.iterdir()):
                path.rmdir()
        self.created = []

    # ---- what the run is ----

    def check_unused(self):
        """Raise UserError where the folder holds anything."""
        def check():
            if self.record.exists():
                raise UserError(f"{self.out} already holds a run: continue it with --resume {self.out}, or name "
                                "another --out")
            found = [*self.private.iterdir(), *self.out.iterdir()]
            if strange := [path for path in found if path not in (self.private, self.lock)]:
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

        tensors: {name: tensor}; state: {str: int}; identity: dict of JSON values, what the checkpoint belongs to.
        """
        metadata = {key: str(number) for key, number in state.items()} | {"belongs_to": json.dumps(digests(identity))}
        save_safetensors(self.checkpoint, tensors, metadata, mode=0o600)

    def load(self, identity):
        """(tensors, state) of the checkpoint, or ({}, {}) where there is none yet.

        Raises UserError where it is damaged, or belongs to another identity.
        """
        if not from_first(self.checkpoint.exists):
            return {}, {}
        tensors, metadata = load_safetensors(self.checkpoint)
        theirs, ours = parse_json(metadata.get("belongs_to", "{}"), self.checkpoint), digests(identity)
        if differing := [key for key in ours if theirs.get(key) != ours[key]]:
            raise UserError(f"{self.checkpoint} belongs to a run with another {differing[0]}: restore {self.record}, "
                            "or start a new run with another --out")
        return tensors, {key: int(text) for key, text in metadata.items() if text.isdecimal()}

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
