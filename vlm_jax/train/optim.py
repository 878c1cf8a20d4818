"""Optimizers: AdamW with a schedule, global-norm clipping and weight decay by parameter path."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import optax

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


def make_optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """The gradient transformation of `config` for a run of `steps`."""

    def decays(params: PyTree) -> PyTree:
        return map_with_path(lambda path, _: re.search(config.decay_pattern, path) is not None, params)

    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adam = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(clip, adam)
