"""A run laid out on a mesh: its state as shapes that say where each array will lie, and its functions, jitted.

Nothing is allocated, and the mesh's devices need not be there. Callers trace under the mesh (`jax.set_mesh`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from vlm_jax.contract import Batch, Model, abstract_batch
from vlm_jax.sharding import batch_sharding, check_batch_size, placed, replicated
from vlm_jax.train.optim import make_optimizer
from vlm_jax.train.plan import Training
from vlm_jax.train.step import TrainState, init_train_state, make_train_step, train_state_shardings


class Programs(NamedTuple):
    """What a run executes."""

    state: TrainState
    """Shapes and dtypes, each with the sharding of the array."""
    init: jax.stages.Wrapped
    """`(key, batch, given) -> state`, as `init_train_state`"""
    step: jax.stages.Wrapped
    """`(state, batch, key) -> (state, metrics)`; overwrites the state that it is given."""


def laid_out(
    model: Model,
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, Any],
    mesh: Mesh,
    *,
    frozen: Sequence[str] = (),
    frozen_dtype: str | None = None,
    ema_decay: float | None = None,
) -> tuple[TrainState, jax.stages.Wrapped]:
    """The state that `init_train_state` makes, as shapes with their shardings, and that function, jitted.

    Args:
      batch: `jax.ShapeDtypeStruct`s. Where they lie as the batches to come, the function is not traced again for these.

    Raises:
      UserError: the mesh cannot split a parameter, or none is matched by one of `frozen`.
    """

    def init(key: jax.Array, batch: Batch, given: Mapping[str, jax.Array]) -> TrainState:
        return init_train_state(
            model, optimizer, key, batch, given, frozen=frozen, frozen_dtype=frozen_dtype, ema_decay=ema_decay
        )

    abstract = jax.jit(init).eval_shape(jax.eval_shape(lambda: jax.random.key(0)), batch, {})
    shardings = train_state_shardings(model, optimizer, abstract, mesh)
    return placed(abstract, shardings), jax.jit(init, out_shardings=shardings)


def programs(
    model: Model, training: Training, mesh: Mesh, *, frozen: Sequence[str] = (), frozen_dtype: str | None = None
) -> Programs:
    """What a run executes on a mesh.

    Raises:
      UserError: the mesh cannot split the batch or a parameter, or no parameter is matched by one of `frozen`.
    """
    check_batch_size(training.batch_size, mesh, training.micro_steps)
    optimizer = make_optimizer(training.optimizer, training.steps)
    batch = placed(abstract_batch(model.inputs, training.batch_size), batch_sharding(mesh))
    state, init = laid_out(
        model, optimizer, batch, mesh, frozen=frozen, frozen_dtype=frozen_dtype, ema_decay=training.ema_decay
    )
    step = make_train_step(model, optimizer, micro_steps=training.micro_steps, ema_decay=training.ema_decay)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Programs(state, init, jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh))))
