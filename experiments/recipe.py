"""What is done to pmp.py for the models of plan.py that have a `change`: other recipes than the paper's."""

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import numpy as np
import pmp
import torch

from model import initial_std, initial_value, secret_generator
from pmp import MaskedAdamW


def old_initial_value(network, name, shape, secret):
    """theta(0) as it was drawn before: the product of two fp32 numbers, which leaves gaps between its values."""
    std = initial_std(network, name)
    if not std:
        return initial_value(network, name, shape, secret)  # a constant
    draw = secret_generator(secret, name).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(draw).mul_(std).add_(0.0)


@contextmanager
def old_theta_0():
    """Inside the block, pmp.py draws theta(0) as it did before."""
    with mock.patch("model.initial_value", old_initial_value), mock.patch("pmp.initial_value", old_initial_value):
        yield


class ConstantStage1(MaskedAdamW):
    """Stage I at a constant rate and without weight decay, as in the authors' script. Stage II is as it was."""

    def __init__(self, params, masks, weight_decay, *betas, lr):
        super().__init__(params, masks, weight_decay if masks else 0.0, *betas)
        self.constant = None if masks else lr

    def step(self, lr, clip=math.inf):
        return super().step(self.constant or lr, clip)


class Shrinking(MaskedAdamW):
    """The complement is shrunk to a ball after each fiftieth of the updates, as in the authors' script."""

    def __init__(self, params, masks, weight_decay, *betas, steps):
        super().__init__(params, masks, weight_decay, *betas)
        self.every, self.done = max(1, steps // 50), 0
        self.radius = self.norm() * 0.0055 if masks else None  # at their scale: 2 of 363

    def norm(self):
        """Of the complement."""
        return math.sqrt(sum(float(p.detach()[~self.masks[name]].double().square().sum())
                             for name, p in self.params.items()))

    @torch.no_grad()
    def step(self, lr, clip=math.inf):
        norm = super().step(lr, clip)
        self.done += 1
        if self.masks and self.done % self.every == 0 and (now := self.norm()) > self.radius:
            for name, p in self.params.items():
                p[~self.masks[name]] *= self.radius / now
        return norm


@contextmanager
def other_optimizer(make, moves=False):
    """Inside the block, pmp.py trains with make(params, masks, …); moves: the complement may change."""
    with mock.patch("pmp.MaskedAdamW", make), mock.patch.object(pmp, "COMPLEMENT_MOVES", moves):
        yield


def changed(name, flags):
    """The context in which pmp.py trains a model whose plan says `name`. flags: those of the run."""
    return {"": nullcontext, "old": old_theta_0,
            "stage1": partial(other_optimizer, partial(ConstantStage1, lr=flags.get("lr"))),
            "shrunk": partial(other_optimizer, partial(Shrinking, steps=flags.get("steps")), moves=True),
            "betas": partial(other_optimizer, partial(MaskedAdamW, betas=(0.9, 0.999)))}[name]()
