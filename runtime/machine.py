"""Where and how to compute: device, precision, compiler."""

import os

import torch

from .files import UserError
from .parallel import world


class Machine:
    """A device and a precision. Raises UserError for what this computer does not have."""

    def __init__(self, device="auto", dtype="auto"):
        """device: auto, cpu, cuda, cuda:1, …; dtype: auto, fp32 or bf16, the precision of matrix products."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and world() > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(device)
            torch.ones(1, device=self.device).item()  # "meta" has no values
        except (RuntimeError, AssertionError, NotImplementedError, ImportError):
            raise UserError(f"--device {device} is not available here: use cpu, or leave the flag out") from None
        if self.device.type == "cuda" and world() > 1:
            torch.cuda.set_device(self.device)  # where NCCL, too, finds this rank's tensors
        if dtype == "auto":
            dtype = "bf16" if self.has_fast_bf16() else "fp32"
        self.dtype = dtype

    def has_fast_bf16(self):
        """Whether bf16 matrix products are faster than fp32's."""
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        if self.device.type == "cpu":  # torch has no public question for these
            names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            return any(getattr(torch.cpu, name, bool)() for name in names)
        return False

    def autocast(self):
        """The context in which a forward pass has this machine's precision."""
        # each weight is cast once in a pass: a cache would only keep the copies
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16", cache_enabled=False)

    def wants_compile(self, flag, tokens):
        """Whether to compile a run of so many tokens. On a CPU, compiling takes what it saves on half a million."""
        return flag == "on" or flag == "auto" and (self.device.type == "cuda" or tokens > 5e5)

    def compile(self, model, example, say):
        """Compile every block of `model` in place, tried on the token ids `example`; without a compiler, say so.

        All blocks share one compiled code, which takes a sixth of the time of compiling the whole.
        """
        for block in model.blocks():
            block.compile()
        try:
            with self.autocast():
                loss = model(example, example)
            loss.backward()
        except Exception as error:  # whatever a missing or broken compiler raises, training can go on without
            torch.compiler.set_stance("force_eager")
            say(f"note: torch.compile does not work here ({type(error).__name__}), going on without it")
        model.zero_grad(set_to_none=True)
