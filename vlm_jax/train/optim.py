"""Optimizers: AdamW with a schedule, global-norm clipping and weight decay by parameter path."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from vlm_jax.errors import UserError
from vlm_jax.trees import map_with_path

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (1711.05101)."""

    learning_rate: float
    """The schedule's peak."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After the warm-up: stay, or fall to zero along a line or a half cosine (1608.03983)."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from zero."""
    decay_steps: int | None = None
    """Step at which a falling schedule reaches zero; None: the last one. State it to train on past that."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled, times the learning rate."""
    decay_pattern: str = r"(kernel|embedding)$"
    """Regular expression of the paths that decay; gains, biases and temperatures do not."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: never."""

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, what: str) -> None:
            if not holds:
                raise UserError(f"the optimizer's {name} is {getattr(self, name)}: choose {what}")

        require("learning_rate", 0 <= self.learning_rate < math.inf, "a finite rate, 0 or more")
        require("warmup_steps", self.warmup_steps >= 0, "0 steps or more")
        require("decay_steps", self.decay_steps is None or self.decay_steps > 0, "1 step or more, or None: all of them")
        require("b1", 0 <= self.b1 < 1, "a number from 0 up to, but not, 1")
        require("b2", 0 <= self.b2 < 1, "a number from 0 up to, but not, 1")
        require("eps", 0 < self.eps < math.inf, "a finite number above 0")
        require("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number, 0 or more")
        require("clip_norm", self.clip_norm is None or 0 < self.clip_norm < math.inf, "a finite number above 0 or None")
        try:
            re.compile(self.decay_pattern)
        except re.error as error:
            require("decay_pattern", False, f"a regular expression, which this is not ({error})")


def learning_rate_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Step (0-based) -> learning rate. A run shorter than its warm-up, such as a trial, ends within it."""
    peak = config.learning_rate
    rest = max((config.decay_steps or steps) - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    # From one part in `warmup_steps`, so that the first update is not wasted on a rate of zero.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients whose norm, over all leaves, is above `limit` down to it.

    By one factor, which XLA multiplies into the moments' updates. optax's own divides each gradient, in a pass over
    memory of its own that cost more than half of AdamW's time on the CPU.
    """

    def update(gradients: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        factor = jnp.minimum(1, limit / optax.tree.norm(gradients))
        return jax.tree.map(lambda gradient: (gradient * factor).astype(gradient.dtype), gradients), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """The gradient transformation of `config` for a run of `steps`."""

    def decays(params: PyTree) -> PyTree:
        return map_with_path(lambda path, _: re.search(config.decay_pattern, path) is not None, params)

    clip = optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm)
    adam = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(clip, adam)
