"""What all programs here share, and no reader of the paper has to open.

Errors in one sentence, flags, files that are whole or not there, safetensors, the device, and torchrun's ranks.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import signal
import struct
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for torch's tensors, read at its first allocation

import torch
import torch.distributed as dist

try:
    import fcntl
    import resource
except ImportError:  # Windows
    raise SystemExit("error: this program needs Linux or macOS: on Windows run it in WSL") from None

# ---- errors and the command line -----------------------------------------------------------------------------------


class UserError(Exception):
    """Something that the user can mend, in one sentence that says what is wrong and what to do."""


class Stopped(SystemExit):
    """A signal asked for the end. The code is 128 and the signal's number, as a shell has it."""


@contextmanager
def stop_signals(asked):
    """Inside the block SIGINT, SIGTERM, SIGHUP and SIGUSR1 add their number to the list `asked`.

    After the first of them SIGINT ends the process. Signals that are ignored, as nohup's, stay so.
    """
    before = {}

    def ask(number, frame):
        asked.append(number)
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text="", end="\n"):
    """Print. What cannot be printed is dropped: a reader of a pipe that has gone never ends a run."""
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


def printable(text):
    """Text whose control characters are spelled out: what a stranger's file brings could steer the terminal."""
    kept = "\n\t\xa0\u3000\u200c\u200d\u202f"  # spaces, and what joins letters
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are UserErrors."""

    def __init__(self, description, **options):
        def form(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100)
        super().__init__(description=description, allow_abbrev=False, formatter_class=form, **options)

    def error(self, message):
        raise UserError(f"{message}; -h lists the flags")


def number(kind, least, most):
    """A `type=` for argparse: an int or a float from `least` to `most`, both allowed."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {noun} from {least:g} to {most:g}")
        return value
    parse.range = f"{least if least > 1e-6 else 0:g}.." + (f"{most:g}" if most < 1e5 else "")  # what -h shows
    return parse


def path(text):
    """A `type=` for argparse: the name of a file or folder, with ~ expanded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8: rename it") from None
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name")
    return os.path.expanduser(text)


def no_core_dumps():
    """A core dump would have the secret in it. Of all limits, 1 stops those, too, that Linux pipes to a program."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError:
        pass  # they are forbidden already


def command_line(main):
    """Run main(). What a user can mend becomes one sentence and exit code 2; a programming error keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as a program has it for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 2
    try:
        main()
        return
    except UserError as error:
        message = f"error: {error}"
    except OSError as error:
        if error.filename is None:
            raise
        message = f"error: cannot use {error.filename} ({error.strerror}): check the path, the disk and its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"error: no space left to write {error.filename}: free some disk and run again (pmp.py: --resume)"
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            message = "error: out of memory: use a smaller --batch-size (pmp.py: and another --out)"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = f" {error}".splitlines()[-1].strip()  # NCCL's own is in the last line
            message = f"error: a rank has died or is out of reach ({reason}): start again, pmp.py goes on with --resume"
        else:
            raise
        code = 1
    except KeyboardInterrupt:
        message, code = "\nstopped; the same command goes on", 130
    except SystemExit as leaving:
        leave_ranks(leaving.code, wait=False)
        raise
    message = printable(message)
    if len(message) > 1000:  # a stranger's file may have names of any length
        message = message[:500] + " ... " + message[-500:]
    print(message, file=sys.stderr)
    leave_ranks(code, wait=False)
    raise SystemExit(code)


def out_of_memory(error):
    """Whether an exception says that memory ran out; torch has no class of its own for a CPU's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


# ---- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path, mode=0o644):
    """Open `path` for binary writing so that it appears whole or not at all, also after a power cut.

    Writes NAME.*.partial beside it, syncs, renames, syncs the folder. A link is replaced, not followed. mode: its
    permission bits. Raises OSError with the file's name; the old file stays then.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # no other process writes the same one
    try:
        with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask says
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save covers up a full disk
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write's error does not say where
        raise error
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError:
        pass  # some file systems cannot sync a folder


def write_json(path, content, mode=0o644):
    """Write a JSON value, atomically."""
    with atomic(path, mode) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path, most=100_000_000):
    """The JSON object in a file of a stranger, at most `most` bytes, every key in it once.

    Raises UserError where there is none.
    """
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file: name a file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} is larger than {most:,} bytes, which no file of its kind is: restore it from a copy")
    try:
        found = json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        raise UserError(f"{path} is not JSON ({error}): restore it from a copy") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: restore it from a copy")
    return found


@contextmanager
def lock(path):
    """Hold the lock file `path` inside the block. Gives True, or False where another process holds it.

    The system takes the lock back when a process dies. Where the file system has no locks, rank 0 holds it; one run at
    a time is then up to the user.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)) as file:
        mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:
            mine = rank() == 0
        yield mine


# ---- safetensors: 8 bytes of header length, a JSON header, raw little-endian tensors. No pickle, nothing to execute --

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
LARGEST_HEADER = 100_000_000  # bytes


def raw_bytes(tensor):
    """The memory of a CPU tensor as a flat numpy uint8 array."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def fingerprint(tensors):
    """sha256 (hex) over names, shapes and bytes of {name: CPU tensor} in any order: the identity of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()


def save_safetensors(path, tensors, metadata, mode=0o644):
    """Write {name: CPU tensor} and {str: str} metadata atomically; their fingerprint joins the metadata as "sha256"."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {**metadata, "sha256": fingerprint(tensors)}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic(path, mode) as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in tensors.values():
            file.write(raw_bytes(tensor))


def load_safetensors(path):
    """({name: tensor}, metadata) of a file, on the CPU. The tensors are private views of the file.

    Raises UserError where it is no safetensors file, is damaged, or does not have the sha256 in its metadata.
    """
    unfit = UserError(f"{path} is no safetensors file, or is damaged: restore it from a copy")
    if Path(path).exists() and not Path(path).is_file():
        raise unfit
    tensors = {}
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:  # shared=False: copy on write, so the file stays as it is, whatever becomes of a tensor
            content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise UserError(f"{path} cannot be mapped into memory ({error}): copy it to another disk") from None
        try:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            if start > min(size, LARGEST_HEADER):
                raise unfit
            header = json.loads(file.read(start - 8))
            metadata = header.pop("__metadata__", {})
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            data = content[start:]
            end = 0
            for name, entry in entries:
                dtype = DTYPES[entry["dtype"]]
                begin, stop = entry["data_offsets"]
                if begin != end or stop - begin != math.prod(entry["shape"]) * dtype.itemsize:
                    raise unfit  # the tensors must fill the file without a gap
                # a copy is aligned to its element size; a slice of the file need not be
                part = data[begin:stop] if (start + begin) % dtype.itemsize == 0 else data[begin:stop].clone()
                tensors[name] = part.view(dtype).view(entry["shape"])
                end = stop
            if end != len(data) or not isinstance(metadata, dict):
                raise unfit
            intact = "sha256" not in metadata or metadata["sha256"] == fingerprint(tensors)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError, struct.error):
            raise unfit from None
    if not intact:
        raise UserError(f"{path} is damaged (its sha256 is wrong): restore it from a copy")
    return tensors, metadata


# ---- the device ----------------------------------------------------------------------------------------------------


def pick_device(name):
    """The torch.device for a --device flag; "auto" is a GPU where there is one. Raises UserError without it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and world() > 1:
        raise UserError(f"--device {name} would put all ranks on one GPU: use cuda, and each takes its own")
    if name == "cuda" and world() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name} is not available here: use cpu, or leave the flag out") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where NCCL, too, finds this rank's tensors
    return device


def pick_dtype(name, device):
    """fp32 or bf16 for a --dtype flag; "auto" is bf16 where its matrix products are faster."""
    if name != "auto":
        return name
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":  # torch has no public question for these
        questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, question, bool)() for question in questions)
    return "bf16" if fast else "fp32"


def autocast(device, dtype):
    """The context in which a forward pass computes in fp32 or bf16; the weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=False)


def compile_model(model, example, device, dtype):
    """torch.compile `model` in place, and try it on the loss of token ids `example`. Without a compiler, say so."""
    say("compiling, which takes up to a minute")
    model.compile()
    try:
        with autocast(device, dtype):
            model(example, example).backward()
    except Exception as error:  # whatever a missing or broken compiler raises, training can go on without
        if out_of_memory(error):
            raise
        torch.compiler.set_stance("force_eager")
        say(f"note: torch.compile does not work here ({type(error).__name__}), going on without it")
    model.zero_grad(set_to_none=True)


# ---- progress ------------------------------------------------------------------------------------------------------


class Progress:
    """A line that updates on a terminal, a plain line now and then elsewhere, and every step in a .jsonl file."""

    FORMS = {"loss": ".3f", "lr": ".1e", "norm": ".2f", "iou": ".3f", "val": ".3f"}

    def __init__(self, amount, unit, log=None, size=0):
        """amount: how much of `unit` a step is worth. log: a file, or None; what is behind `size` bytes comes again."""
        self.amount, self.unit = amount, unit
        self.path, self.bytes, self.log = log if rank() == 0 else None, size, None
        self.stage, self.pace, self.best = None, None, math.inf  # seconds a step: of late, and at best
        self.unprinted = math.inf  # seconds since the last line
        self.terminal = bool(sys.stdout and sys.stdout.isatty())

    def step(self, stage, step, steps, seconds, **numbers):
        """Record step (from 1) of so many steps of a stage, which took `seconds`."""
        if stage != self.stage:  # the first step of a stage also pays for starting up
            self.stage, self.pace = stage, None
        else:
            self.pace = 0.95 * (self.pace or seconds) + 0.05 * seconds
            self.best = min(self.best, self.pace)
        rate = round(self.amount / self.pace) if self.pace else 0
        if self.path:
            line = json.dumps({"stage": stage, "step": step, self.unit: rate, **numbers}) + "\n"
            try:
                if self.log is None:
                    self.log = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
                    self.bytes = min(self.bytes, os.fstat(self.log).st_size)
                    os.truncate(self.log, self.bytes)
                if os.write(self.log, line.encode()) == len(line):
                    self.bytes += len(line)
                else:  # a full disk: the line is lost, and the checkpoint will say so
                    os.truncate(self.log, self.bytes)
            except OSError:
                pass
        if self.pace and self.pace > 5 * self.best:
            say("note: the speed fell to a fifth; if another program uses these cores, OMP_WAIT_POLICY=PASSIVE helps")
            self.best = math.inf
        last = step == steps or "val" in numbers
        self.unprinted += seconds
        if not (self.terminal or last or self.unprinted > 10):
            return
        self.unprinted = 0.0
        text = f"{stage} {step}/{steps}"
        if rate:
            minutes, rest = divmod(int((steps - step) * self.pace), 60)
            text += f" | eta {minutes}:{rest:02d} | {self.unit} {rate:,}"
        for name, value in numbers.items():
            text += f" | {name} {value:{self.FORMS[name]}}"
        if self.terminal and last:
            say(f"\r\033[K{text}")
        elif self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line could not be written over
            say(f"\r\033[K{text[:width]}", end="")
        else:
            say(text)


# ---- more than one device: torchrun starts the program once for each, as ranks 0, 1, … ------------------------------


def join_ranks(limit=timedelta(minutes=30)):
    """Become one of torchrun's ranks, if it started this process. Only rank 0 prints; errors go to stderr on any.

    limit: of waiting for another rank that hangs. With gloo a dead one closes its connections, which the others notice
    at once. With NCCL they wait for the limit, or for torchrun to kill them.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set and {missing[0]} is not: start with torchrun, or unset WORLD_SIZE")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=limit)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def leave_ranks(code=0, wait=True):
    """End this process if it is one of several ranks; wait: when all of them have come here.

    This skips Python's own exit. There gloo's threads abort about one process in fifty (torch 2.13), and torchrun would
    report a finished run as a failure.
    """
    if dist.is_initialized():
        if wait:
            dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def world():
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_first(function):
    """What function() returns on rank 0, on every rank. If it raises there, the others leave without a word."""
    if world() == 1:
        return function()
    message = [None, "failed"]
    try:
        if rank() == 0:
            message = [function(), "done"]
    finally:
        dist.broadcast_object_list(message)
    if message[1] == "failed":
        os._exit(2)
    return message[0]


def first_then_others(function):
    """What function() returns, on every rank its own. Rank 0 goes first, and prepares what the others then find."""
    mine = []
    from_first(lambda: mine.append(function()))
    return mine[0] if mine else function()


def mean_over_ranks(tensors):
    """Replace each tensor by its mean over the ranks."""
    if world() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        torch._foreach_div_(tensors, world())


def any_rank(flag):
    """Whether `flag` is true on any rank: the same answer on all of them."""
    raised = torch.tensor(float(bool(flag)))
    if world() > 1:
        dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


# With --shard a tensor is split by rows over the ranks (torch's FSDP2), as a DTensor. Of an ordinary tensor these give
# the tensor itself.


def sharded(tensor):
    """Whether a tensor is split over the ranks."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """All of a tensor, gathered on every rank. Where it is sharded every rank must call this, in the same order."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def split_like(p, full):
    """The tensor `full` on p's device, split as p is."""
    full = full.to(p.device)
    if not sharded(p):
        return full
    from torch.distributed.tensor import distribute_tensor  # takes as long to import as torch
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def gather(tensors):
    """{name: whole CPU tensor} on rank 0, {} on the others. Every rank must call this."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def shard(model, device):
    """Split the tensors of `model` (on "meta") by rows over the ranks, on `device`, still empty.

    FSDP gathers a block when it is needed, and averages its gradient after each micro-batch.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (world(),))
    for part in (*model.blocks(), model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device=device)
    model.tie()
    return model
