"""What a user types and sees: flags made of a dataclass, a progress line, errors in one sentence."""

import argparse
import json
import os
import reprlib
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import field, fields

from .files import UserError, is_name
from .parallel import launcher, leave_ranks, lost_rank, rank

LONGEST = 1000  # characters of a message

# ---- flags ---------------------------------------------------------------------------------------------------------


def flag(default, help, choices=None):
    """A dataclass field that is a flag of the command line.

    choices: a tuple, or a function that gives one when the flags are read: what it lists may be defined later.
    """
    return field(default=default, metadata={"help": help, "choices": choices})


def choices_of(f):
    """The tuple of values that a field made by flag() may have, or None."""
    choices = f.metadata["choices"]
    return choices() if callable(choices) else choices


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one sentence here, like all others."""

    def __init__(self, description, **options):
        super().__init__(description=description, allow_abbrev=False, **options, formatter_class=lambda prog:
                         argparse.RawDescriptionHelpFormatter(prog, max_help_position=28))

    def error(self, message):
        raise UserError(f"{message}; -h lists the flags")

    def add_fields(self, kind, show, typed_only=False):
        """Add a flag for each field of the dataclass `kind`, all made by flag().

        show(field): what the help text says of the default. typed_only: leave what was not typed out of the namespace,
        instead of its default.
        """
        for f in fields(kind):
            help = (f.metadata["help"] + show(f)).replace("%", "%%")
            options = {"type": f.type, "choices": choices_of(f)}
            if f.type is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif options["choices"] is None:
                options["metavar"] = {int: "N", float: "X"}.get(f.type, "TEXT")
            self.add_argument("--" + f.name.replace("_", "-"), **options, help=help,
                              default=argparse.SUPPRESS if typed_only else f.default)


def flag_name(name):
    """The flag of a dataclass field, as it is typed."""
    return "--" + name.replace("_", "-")


def require(holds, sentence):
    """Raise UserError(sentence) unless a condition holds."""
    if not holds:
        raise UserError(sentence)


def check_fields(settings):
    """Raise UserError where a field of a dataclass made of flag()s has a value of another type, or none of its choices.

    The command line's parser sees to both; a file that was edited may have anything.
    """
    for f in fields(settings):
        value, choices = getattr(settings, f.name), choices_of(f)
        allowed = (int, float) if f.type is float else (f.type,)
        fits = type(value) in allowed or value is None and f.default is None
        start = f"{flag_name(f.name)} {reprlib.repr(value)}"  # shortened: a file can hold a value of any depth
        require(fits, f"{start} is no {f.type.__name__}")
        require(type(value) is not int or abs(value) < 2**63, f"{start} is too large")
        require(not choices or value in choices, f"{start} is none of {', '.join(choices or ())}")
        require(f.type is not str or is_name(value), f"{start} is empty or has characters that no name can have")


def one_line(text):
    """A message as one printable line of bearable length, whatever names and values of strange files are in it."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST // 2]} ... {text[-LONGEST // 2:]}"


def command_line(main):
    """Run main(): what a user can fix is one sentence and exit code 2; Ctrl-C is exit code 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program may have turned it off for its imports
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        text, code = f"{error.start}: {one_line(str(error))}", error.code
    except BrokenPipeError:  # the reader of a pipe has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's exit has nothing to say
        text, code = "", 141  # as if SIGPIPE had ended the process
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        text = (f"error: rank {rank()} has lost another rank, which died or was killed; go on from the last checkpoint "
                f"with {launcher()} and the flag --resume")
        code = 1
    except KeyboardInterrupt:
        text, code = "\nstopped; the same command goes on", 130
    if text:
        print(text, file=sys.stderr)
    leave_ranks(code, wait=False)
    raise SystemExit(code)


# ---- progress ------------------------------------------------------------------------------------------------------

LABELS = {"tokens_per_s": "tokens/s", "rows_per_s": "rows/s", "val_loss": "val", "grad_norm": "norm",
          "iou_chance": "chance"}
FORMS = {"loss": ".3f", "lr": ".1e", "grad_norm": ".2f", "iou": ".3f", "iou_chance": ".3f", "val_loss": ".3f",
         "eta": ""}


class Progress:
    """A line that updates on a terminal, a plain line now and then elsewhere, and every step in a .jsonl file."""

    def __init__(self, path, per_step, rate="tokens_per_s", prefix="stage "):
        """per_step: how much of what `rate` counts a step is worth; prefix: what stands before a stage's name."""
        self.file = open(path, "a", encoding="utf-8") if path else None
        self.per_step, self.rate, self.prefix = per_step, rate, prefix
        self.terminal = sys.stdout.isatty()
        self.printed = 0.0
        self.stage, self.last = None, 0

    def say(self, text):
        """Print a line of its own."""
        print(f"\r\033[K{text}" if self.terminal else text, flush=True)

    @contextmanager
    def pause(self):
        """Stop the clock, for what is not training."""
        began = time.perf_counter()
        yield
        if self.stage:
            self.clock += time.perf_counter() - began

    def log_bytes(self):
        """How long the .jsonl file is by now."""
        return self.file.tell() if self.file else 0

    def step(self, stage, step, steps, **numbers):
        """Record step (from 1) of so many steps of a stage."""
        now = time.perf_counter()
        if stage != self.stage:  # the first step also pays for starting up: the rate begins after it
            self.stage, self.clock, self.first = stage, now, step
        self.last = step
        rate = (step - self.first) / max(1e-9, now - self.clock)  # steps/s
        numbers = {self.rate: round(rate * self.per_step), **numbers}
        if self.file:
            self.file.write(json.dumps({"stage": stage, "step": step, **numbers}) + "\n")
            self.file.flush()
        last = step == steps
        if not (self.terminal or last or now - self.printed > 10 or "val_loss" in numbers):
            return
        self.printed = now
        if rate:
            left = (steps - step) / rate
            numbers = {"eta": f"{int(left // 60)}:{int(left % 60):02d}"} | numbers
        else:  # nothing is known of the speed yet
            del numbers[self.rate]
        text = " | ".join(f"{LABELS.get(key, key)} {value:{FORMS.get(key, ',d')}}" for key, value in numbers.items())
        line = f"{self.prefix}{stage} {step}/{steps} | {text}"
        if self.terminal:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be written over
            print(f"\r\033[K{line}", end="\n" if last or "val_loss" in numbers else "", flush=True)
        else:
            print(line, flush=True)
