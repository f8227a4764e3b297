"""Files: errors that a user can fix, writing whole or not at all, locks, and results as JSON lines."""

import errno
import hashlib
import json
import os
import secrets
import stat
import time
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    raise SystemExit("error: this program needs file locks of Linux or macOS: on Windows run it in WSL") from None


class UserError(Exception):
    """Something that the user can fix. The command lines print it as one sentence and exit with code 2."""

    start, code = "error", 2


class Stopped(UserError):
    """Why a run that had begun cannot go on. Exit code 1."""

    start, code = "stopped", 1


FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
UNFIT_PATH = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT,
              errno.ELOOP, errno.ENAMETOOLONG, errno.EIO, errno.ENOMEM)


@contextmanager
def disk_errors(path):
    """Raise a UserError for a full disk, and for a path that is missing, forbidden, of another kind or too large.

    Other errors pass: those of the network are OSErrors, too.
    """
    try:
        yield
    except OSError as error:
        path = error.filename or path
        if error.errno in FULL_DISK:
            raise UserError(f"no space left to write {path}: free some disk and run again, it goes on") from None
        if error.errno in UNFIT_PATH:
            raise UserError(f"cannot use {path} ({error.strerror}): check the path and its permissions") from None
        raise


@contextmanager
def atomic(path, mode=0o644):
    """Open `path` for binary writing so that it appears whole or not at all, also after a power cut.

    Writes to a new temporary name in the same folder, syncs, renames, syncs the folder. On any error the old file
    stays. A link at `path` is replaced, never followed. mode: the file's permission bits. Raises UserError when the
    disk is full or forbids it.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with disk_errors(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        number = os.open(partial, flags, mode)
        try:
            with open(number, "wb") as file:
                os.fchmod(number, mode)  # whatever the umask says
                yield file
                file.flush()
                os.fsync(number)
            os.replace(partial, path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def sync_folder(folder):
    """Bring the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def remove_partials(folder):
    """Delete what killed processes left half written in a folder. Only its owner may: see `lock`."""
    with disk_errors(folder):
        for path in Path(folder).glob("*." + 8 * "[0-9a-f]" + ".partial"):  # as atomic() names them, no one else's
            path.unlink(missing_ok=True)


@contextmanager
def lock(path):
    """Hold the lock file `path` inside the block. Gives True, or False where another process holds it.

    The system takes the lock back when a process dies.
    """
    with disk_errors(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path))  # nobody deleted it
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(file)


@contextmanager
def lock_unless(done, path, say, words):
    """Hold the lock file `path` inside the block and give True; or give False as soon as done() is true.

    Waits while another process holds the lock and done() is still false, and says `words` once if it does.
    """
    said = False
    while not done():
        with lock(path) as mine:
            if mine:
                yield not done()
                return
        if not said:
            say(words)
        said = True
        time.sleep(0.2)
    yield False


# ---- JSON ----------------------------------------------------------------------------------------------------------

LARGEST_JSON = 100_000_000  # bytes


def is_name(text):
    """Whether a string can name a file: it is not blank, has no NUL, and the system can spell it."""
    try:
        return bool(text.strip()) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a character, as JSON can have it
        return False


def open_regular(path):
    """Open a regular file to read bytes. Raises UserError where it is missing, a folder, a pipe or a device."""
    with disk_errors(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is no regular file: name a file")
        return open(path, "rb")


def parse_json(content, where, fix="restore it from a copy"):
    """The JSON object in `content` (bytes or str). Raises UserError with `where` and `fix` for anything else."""
    try:
        found = json.loads(content, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError):  # the latter: nested too deeply
        raise UserError(f"{where} is not JSON: {fix}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is not a JSON object: {fix}")
    return found


def without_repeats(pairs):
    """The dict of a JSON object's pairs. Raises ValueError where a key comes twice: readers would not agree on it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def read_json(path):
    """The JSON object in a file. Raises UserError where there is none."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than any file of its kind: restore it from a copy")
        return parse_json(file.read(), path)


def write_json(path, content, mode=0o644):
    """Write a JSON value, atomically."""
    with atomic(path, mode) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


# ---- results: one JSON object a line -------------------------------------------------------------------------------


def without_torn_end(content):
    """The lines in `content` (bytes), each with its end, but for a last one that is the mere beginning of an object."""
    whole, newline, last = content.rpartition(b"\n")
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        if not last or last.startswith(b"{"):
            return whole + newline
    return content + b"\n"


class Results:
    """A file of results that several processes may share: one JSON object a line, written whole."""

    def __init__(self, path):
        """path: the .jsonl file, which need not exist yet. Raises UserError where its folder does not."""
        self.path = Path(path)
        if not os.path.isdir(self.path.parent):
            raise UserError(f"there is no folder {self.path.parent} for {self.path.name}: make it first")

    def read(self):
        """The list of results; nothing is written. A last line that a killed process left half written is none.

        Raises UserError where a line is not a JSON object.
        """
        with disk_errors(self.path):
            try:
                os.lstat(self.path)  # a link to nowhere is there, too, and is refused below
            except FileNotFoundError:
                return []
        with open_regular(self.path) as file, self._alone(file):
            content = file.read()
        return [parse_json(line, f"{self.path}, line {number}", "fix that line, or name another file")
                for number, line in enumerate(without_torn_end(content).splitlines(), 1)]

    def append(self, result):
        """Add one result (a dict), whole and synced, in the place of a half-written last line."""
        with disk_errors(self.path), open(self.path, "a+b") as file, self._alone(file):
            file.seek(0)
            content = file.read()
            whole = without_torn_end(content)
            file.truncate(min(len(whole), len(content)))
            file.write(whole[len(content):] + json.dumps(result).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    @contextmanager
    def _alone(file):
        """No other process reads, cuts or appends inside the block."""
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        fcntl.flock(file, fcntl.LOCK_UN)

    @contextmanager
    def claim(self, key):
        """Claim the run that the string `key` names. Gives True, or False where another process is at work on it."""
        folder = self.path.with_name(self.path.name + ".claims")
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        with lock(folder / digest) as mine:
            yield mine
