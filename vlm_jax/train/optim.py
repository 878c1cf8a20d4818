"""Optimizers: AdamW and Adafactor, with a schedule, clipping, and rates and weight decay by parameter path."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from vlm_jax.errors import UserError, pattern_fault
from vlm_jax.trees import leaves_by_path, map_with_path, unmatched

PyTree = Any


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What all optimizers have in common: how far each leaf moves at each step. Not used by itself."""

    learning_rate: float
    """The schedule's peak."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After the warm-up: stay, or fall along a line or a half cosine (1608.03983)."""
    final_share: float = 0.0
    """Of the peak, to which a falling schedule falls."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from zero."""
    decay_steps: int | None = None
    """Step at which a falling schedule has fallen; None: the last one. State it to train on past that."""
    multiples: tuple[tuple[str, float], ...] = ()
    """Regular expressions of paths, and by how much the rate is multiplied where one is found; the first counts. The
    layers of a scanned stack are one leaf: rates that differ from layer to layer take `scan=False`."""
    weight_decay: float = 0.0
    """Decoupled, times the leaf's rate."""
    decay_pattern: str = r"(kernel|embedding)$"
    """Regular expression of the paths that decay; gains, biases and temperatures do not."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: never."""

    def __post_init__(self) -> None:
        self.require("learning_rate", 0 <= self.learning_rate < math.inf, "a finite rate, 0 or more")
        self.require("final_share", 0 <= self.final_share <= 1, "a share, from 0 to 1")
        self.require("warmup_steps", self.warmup_steps >= 0, "0 steps or more")
        steps = self.decay_steps
        self.require("decay_steps", steps is None or steps > 0, "1 step or more, or None: all of them")
        self.require("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number, 0 or more")
        norm = self.clip_norm
        self.require("clip_norm", norm is None or 0 < norm < math.inf, "a finite number above 0 or None")
        for name, pattern in [
            ("decay_pattern", self.decay_pattern),
            *(("multiples", one) for one, _ in self.multiples),
        ]:
            fault = pattern_fault(pattern)
            self.require(name, fault is None, f"a regular expression, which {pattern!r} is not ({fault})")
        positive = all(0 < multiple < math.inf for _, multiple in self.multiples)
        self.require("multiples", positive, "finite numbers above 0; what must not train at all is --frozen")

    def require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"the optimizer's {name} is {getattr(self, name)}: choose {what}")


@dataclass(frozen=True, kw_only=True)
class Optimizer(Rates):
    """AdamW (1711.05101)."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("b1", 0 <= self.b1 < 1, "a number from 0 up to, but not, 1")
        self.require("b2", 0 <= self.b2 < 1, "a number from 0 up to, but not, 1")
        self.require("eps", 0 < self.eps < math.inf, "a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class Adafactor(Rates):
    """Adafactor (1804.04235) as changed in "Scaling Vision Transformers" (2106.04560, section 3.4).

    The second moment of a matrix is kept as the means of its rows and columns, and the first in bfloat16: half the
    bytes of the parameters in all, where AdamW keeps twice them. The rate is absolute, as AdamW's is: it is not
    multiplied by the size of the parameter. big_vision's `wd` is `weight_decay` times `learning_rate` here.
    """

    b1: float = 0.9
    """Of the mean of the updates, which is kept in bfloat16."""
    b2: float = 0.999
    """The second moment forgets by 1 - t^-0.8 at step t, up to this: the paper's own has none and comes to rest."""
    eps: float = 1e-30
    """Added to each squared gradient."""
    clip_rms: float | None = None
    """Each leaf's update is scaled down to this root mean square, 1804.04235's d; None: never."""
    factored_from: int = 32
    """A leaf is factored over its two largest dimensions where both have this size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("b1", 0 <= self.b1 < 1, "a number from 0 up to, but not, 1")
        self.require("b2", 0 <= self.b2 < 1, "a number from 0 up to, but not, 1")
        self.require("eps", 0 < self.eps < math.inf, "a finite number above 0")
        rms = self.clip_rms
        self.require("clip_rms", rms is None or 0 < rms < math.inf, "a finite number above 0 or None")
        self.require("factored_from", self.factored_from >= 1, "1 or more")


def learning_rate_schedule(config: Rates, steps: int) -> optax.Schedule:
    """Step (0-based) -> learning rate. A run shorter than its warm-up, such as a trial, ends within it."""
    peak = config.learning_rate
    rest = max((config.decay_steps or steps) - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, config.final_share * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_share),
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


def multiply_rates(multiples: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies the update of each leaf by the factor of the first pattern that is found in its path.

    Raises (on initialisation):
      UserError: a pattern is found in no path: it is misspelt, or its leaves are frozen.
    """

    def init(params: PyTree) -> optax.EmptyState:
        paths = leaves_by_path(params)
        unused = unmatched([pattern for pattern, _ in multiples], paths)
        if unused and paths:  # optax also asks for the state of a tree without leaves
            raise UserError(
                f"the optimizer's multiples have {unused[0]!r}, which is found in the path of no parameter that "
                f"trains: there are {', '.join(sorted(paths))}"
            )
        return optax.EmptyState()

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        def multiplied(path: str, leaf: jax.Array) -> jax.Array:
            return leaf * next((multiple for pattern, multiple in multiples if re.search(pattern, path)), 1)

        return map_with_path(multiplied, updates), state

    return optax.GradientTransformation(init, update)


def scale_by_adam(config: Optimizer) -> optax.GradientTransformation:
    """Updates of AdamW at a rate of 1, without decay."""
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def scale_by_adafactor(config: Adafactor) -> optax.GradientTransformation:
    """Updates of Adafactor at a rate of 1, without decay."""
    second = optax.scale_by_factored_rms(
        min_dim_size_to_factor=config.factored_from,
        epsilon=config.eps,
        decay_rate_fn=lambda step, power: jnp.minimum(config.b2, 1 - jnp.float32(step + 1) ** -power),
    )
    clip = optax.identity() if config.clip_rms is None else optax.clip_by_block_rms(config.clip_rms)
    return optax.chain(second, clip, optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16))


def make_optimizer(config: Optimizer | Adafactor, steps: int) -> optax.GradientTransformation:
    """The gradient transformation of `config` for a run of `steps`."""

    def decays(params: PyTree) -> PyTree:
        return map_with_path(lambda path, _: re.search(config.decay_pattern, path) is not None, params)

    clip = optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm)
    update = optax.chain(
        scale_by_adafactor(config) if isinstance(config, Adafactor) else scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
        *((multiply_rates(config.multiples),) if config.multiples else ()),
    )
    return optax.chain(clip, update)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, state: PyTree, params: PyTree, shardings: PyTree, everywhere: Sharding
) -> PyTree:
    """Where an optimizer's state lies: a moment beside its parameter, a factored one by the dimensions that it keeps.

    Args:
      state: shapes of the state of `params`, which are shapes too.
      shardings: of `params`.
      everywhere: for what belongs to no parameter.
    """

    def beside(moment: Any, param: Any, sharding: NamedSharding) -> Sharding:
        return sharding if moment.shape == param.shape else everywhere

    def without(rank: int, moment: Any, param: Any, sharding: NamedSharding) -> Sharding:
        if moment.shape == (1,):  # stands where nothing is kept
            return everywhere
        axis = np.argsort(param.shape)[rank]  # the mean was taken over it
        kept = [*sharding.spec, *(None,) * (len(param.shape) - len(sharding.spec))]
        return NamedSharding(sharding.mesh, PartitionSpec(*kept[:axis], *kept[axis + 1 :]))

    def factored(part: Any, placed: Any) -> Any:
        if not isinstance(part, optax.FactoredState):
            return placed
        rows, columns = (
            jax.tree.map(lambda *leaf, rank=rank: without(rank, *leaf), moments, params, shardings)
            for rank, moments in ((-1, part.v_row), (-2, part.v_col))
        )
        return placed._replace(v_row=rows, v_col=columns)

    placed = optax.tree_map_params(
        optimizer, beside, state, params, shardings, transform_non_params=lambda _: everywhere
    )
    return jax.tree.map(factored, state, placed, is_leaf=lambda part: isinstance(part, optax.FactoredState))
