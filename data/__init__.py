"""Text for pre-training: documents (sources.py), tokens (tokenizer.py), packed blocks (pack.py).

Here is only what every file of the project shares: the error that a user sees, and the one way to write a file.
"""

import errno
import os
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. The command lines print it as one sentence and exit with code 2."""


@contextmanager
def atomic(path, mode=0o644):
    """Open `path` for binary writing so that it appears whole or not at all, also after a power cut.

    Writes to a temporary name in the same folder, syncs, renames, syncs the folder; on any error the old file stays.
    mode is the file's permission bits. Raises UserError when the disk is full.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)  # a left-over temporary file may have had other permissions
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left to write {path}: free some disk and run again") from None
        raise
    finally:
        partial.unlink(missing_ok=True)
