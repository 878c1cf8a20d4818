"""The train step: one function for every family and every objective."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlm_jax.contract import Aux, Batch, Model
from vlm_jax.errors import UserError
from vlm_jax.identity import listed
from vlm_jax.sharding import parameter_shardings, replicated
from vlm_jax.train.finite import all_finite
from vlm_jax.train.optim import optimizer_shardings
from vlm_jax.trees import leaves_by_path, map_with_path, merge, partition, unmatched

PyTree = Any
Step = Callable[["TrainState", Batch, jax.Array], tuple["TrainState", dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """All that changes as a model trains. Arrays only."""

    step: jax.Array
    """Steps taken so far, int32; with the seed it determines the data and the randomness of the next step."""
    params: PyTree
    """What trains."""
    frozen: PyTree
    """The other parameters, which stay as the run began with them; `{}` where all train."""
    opt_state: PyTree
    """The optimizer's state for `params`."""
    ema: PyTree
    """The exponential moving average of `params`; `{}` where none is kept."""
    collections: PyTree
    """What a model keeps beside its parameters, such as running statistics."""


def init_train_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch: Batch,
    given: Mapping[str, jax.Array] = MappingProxyType({}),
    *,
    frozen: Sequence[str] = (),
    frozen_dtype: str | None = None,
    ema_decay: float | None = None,
) -> TrainState:
    """The state before the first step. Pure: under `jax.eval_shape` it allocates nothing.

    Args:
      given: values by their paths among the variables, such as "params/image/patch/kernel", in place of drawn ones.
      frozen: regular expressions of the paths of parameters that do not train.
      frozen_dtype: of these parameters; None: the model's.

    Raises (when traced):
      UserError: no parameter matches one of `frozen`.
    """
    variables = map_with_path(lambda path, leaf: given.get(path, leaf), dict(model.init(key, batch)))
    params = variables.pop("params")
    paths = leaves_by_path(params)
    if unused := unmatched(frozen, paths):
        raise UserError(f"frozen names {unused[0]}, which no parameter's path matches: there are {listed([*paths])}")
    still, live = partition(params, frozen)
    if frozen_dtype is not None:
        still = jax.tree.map(lambda leaf: leaf.astype(frozen_dtype), still)
    ema = {} if ema_decay is None else jax.tree.map(jnp.copy, live)
    return TrainState(jnp.zeros((), jnp.int32), live, still, optimizer.init(live), ema, variables)


def train_state_shardings(
    model: Model, optimizer: optax.GradientTransformation, abstract: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
    """Where each array of a `TrainState` lies: moments and average beside their parameters, the rest everywhere."""
    params = merge(abstract.params, abstract.frozen)
    shardings = leaves_by_path(parameter_shardings(params, model.rules, mesh))
    live, frozen = (map_with_path(lambda path, _: shardings[path], part) for part in (abstract.params, abstract.frozen))
    everywhere = replicated(mesh)
    opt_state = optimizer_shardings(optimizer, abstract.opt_state, abstract.params, live, everywhere)
    layout: dict[str, Any] = {
        "step": everywhere,
        "params": live,
        "frozen": frozen,
        "opt_state": opt_state,
        "ema": live if abstract.ema else {},
        "collections": jax.tree.map(lambda _: everywhere, abstract.collections),
    }
    return TrainState(**layout)


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation, *, micro_steps: int = 1, ema_decay: float | None = None
) -> Step:
    """Builds `step(state, batch, key) -> (state, metrics)`, a pure function that the caller jits.

    The randomness of a step is `fold_in(key, state.step)`, so that nothing random is stored and a resumed run is the
    same run. Metrics are the loss's own, `loss`, `grad_norm` before clipping, and `finite`, a bool of the new state.

    Args:
      micro_steps: the batch is computed in this many equal parts, one after the other, for its gradient alone to be
        applied; exact for any loss that states its weight.
      ema_decay: the average's decay, approached from below as min(decay, (1 + t) / (10 + t)) so that it forgets the
        initialisation at once; None keeps no average.

    Raises (when traced):
      UserError: `micro_steps > 1` with a loss that cannot be split, or that do not divide the batch.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)

        def loss(params: PyTree, collections: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
            variables = {"params": merge(params, state.frozen), **collections}
            return model.loss(variables, batch, key, state.step, train=True)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        if micro_steps == 1:
            (value, aux), gradients = value_and_grad(state.params, state.collections, batch, key)
        else:
            (value, aux), gradients = accumulate(
                value_and_grad, state.params, state.collections, batch, key, micro_steps
            )

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else average(state.ema, params, ema_decay, state.step)
        finite = all_finite((params, opt_state, ema, aux.state))
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradients), "finite": finite}
        state = TrainState(state.step + 1, params, state.frozen, opt_state, ema, aux.state)
        return state, {**aux.metrics, **metrics}

    return step


def average(ema: PyTree, params: PyTree, decay: float, step: jax.Array) -> PyTree:
    """One update of the moving average."""
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old * keep + new * (1 - keep), ema, params)


def accumulate(
    value_and_grad: Callable[..., Any],
    params: PyTree,
    collections: PyTree,
    batch: Batch,
    key: jax.Array,
    micro_steps: int,
) -> tuple[tuple[jax.Array, Aux], PyTree]:
    """The loss, metrics and gradient of the whole batch, a part at a time.

    Each part counts by its own weight: the mean of the parts' means is wrong as soon as a mask leaves them unequal.
    Mutable collections pass through the parts in order.
    """
    parts = split_strided(batch, micro_steps)
    first = jax.tree.map(lambda x: x[0], parts)
    (_, aux_shape), _ = jax.eval_shape(value_and_grad, params, collections, first, key)
    if aux_shape.weight is None:
        raise UserError(
            f"this model's loss spans the whole batch, so it cannot be accumulated over micro_steps={micro_steps}: "
            f"set micro_steps to 1"
        )

    def body(carry: Any, part: Any) -> tuple[Any, None]:
        total, collections = carry
        index, batch = part
        (value, aux), gradients = value_and_grad(params, collections, batch, jax.random.fold_in(key, index))
        weighted = jax.tree.map(lambda x: x.astype(jnp.float32) * aux.weight, (value, aux.metrics, gradients))
        total = jax.tree.map(jnp.add, total, (*weighted, aux.weight.astype(jnp.float32)))
        return (total, aux.state), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (aux_shape.weight, aux_shape.metrics, params))
    (total, collections), _ = jax.lax.scan(
        body, ((*zeros, jnp.zeros(())), collections), (jnp.arange(micro_steps), parts)
    )
    value, metrics, gradients, weight = total
    value, metrics, gradients = jax.tree.map(
        lambda x: x / jnp.where(weight > 0, weight, 1), (value, metrics, gradients)
    )
    gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)
    return (value, Aux(metrics, weight, collections)), gradients


def split_strided(batch: Batch, parts: int) -> Mapping[str, jax.Array]:
    """[B, ...] -> [parts, B / parts, ...], part i holding the rows i, i + parts, ...

    Strided, because a part of contiguous rows would lie on a few of the devices that share the batch.
    """
    size = len(next(iter(batch.values())))
    if size % parts:
        raise UserError(f"micro_steps={parts} does not divide the batch of {size}: choose a batch size that it divides")
    return jax.tree.map(lambda x: x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def eval_variables(state: TrainState) -> dict[str, Any]:
    """The variables to evaluate with: averaged parameters where an average is kept."""
    return {"params": merge(state.ema or state.params, state.frozen), **state.collections}
