"""Text for pre-training: documents (sources.py), tokens (tokenizer.py), packed blocks (pack.py).

Here is only what every file of the project shares: the errors that a user sees, and the one way to write a file.
"""

import errno
import os
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. The command lines print it as one sentence and exit with code 2."""


@contextmanager
def disk_errors(path):
    """Raise a UserError for what a full or forbidden disk raises while `path` is written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to write {path}: free some disk and run again, it goes on") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path} cannot be written ({error.strerror}): make it writable or take another") from None
        raise


@contextmanager
def atomic(path, mode=0o644):
    """Open `path` for binary writing so that it appears whole or not at all, also after a power cut.

    Writes to a temporary name in the same folder, syncs, renames, syncs the folder; on any error the old file stays.
    mode is the file's permission bits. Raises UserError when the disk is full or forbids it.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with disk_errors(path):
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
                os.fchmod(file.fileno(), mode)  # a left-over temporary file may have had other permissions
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)
