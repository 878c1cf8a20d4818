"""The training loop: the one place where training meets the disk."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlm_jax.contract import Batch, Model, Variables, check_batch
from vlm_jax.errors import UserError
from vlm_jax.identity import listed
from vlm_jax.sharding import check_batch_size, make_mesh, process_rows, to_global
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.frozen import restore_frozen, save_frozen
from vlm_jax.train.layout import programs
from vlm_jax.train.metrics import MetricsLog
from vlm_jax.train.optim import learning_rate_schedule
from vlm_jax.train.plan import Training
from vlm_jax.train.step import TrainState, eval_variables
from vlm_jax.train.terminal import StopSignal, progress_bar, say
from vlm_jax.train.watch import Moment, Watcher, look
from vlm_jax.trees import leaves_by_path

PyTree = Any
HostBatch = Mapping[str, np.ndarray]
Rows = Int[np.ndarray, " rows"]
TrainBatches = Callable[[Rows, int], Iterator[HostBatch]]
"""`(rows, start)`: from step `start` on, these rows of each global batch."""


class Validation(NamedTuple):
    """The validation split, in order."""

    batches: Callable[[Rows], Iterator[tuple[HostBatch, int]]]
    """`(rows)`: these rows of each global batch, and how many of all its rows, the first ones, count."""
    batch_size: int
    """Of the global batches, the last filled up; the mesh splits it evenly."""


def fit(
    model: Model,
    training: Training,
    workdir: Path,
    train_batches: TrainBatches,
    validation: Validation | None = None,
    watchers: Sequence[Watcher] = (),
    *,
    begin: Callable[[TrainState], Mapping[str, jax.Array]] | None = None,
    frozen: Sequence[str] = (),
    frozen_dtype: str | None = None,
    identity: Mapping[str, str] | None = None,
) -> TrainState:
    """Trains to `training.steps` from the newest good checkpoint in `workdir`, or from the beginning.

    Each step is the same whether or not the run was interrupted before it, and on any mesh and number of processes.
    SIGTERM or Ctrl-C saves, without a score, says so and ends the process with status 0; a second Ctrl-C kills it.

    Args:
      watchers: what else to look at at each checkpoint, after the validation split.
      begin: called where nothing is saved yet, with the shapes of the state and where each array will lie; what it
        returns is the beginning of these variables, by their paths, and the others are drawn.
      frozen: regular expressions of the paths of parameters that do not train, all of which `begin` must give.
      frozen_dtype: of these parameters; None: the model's.
      identity: what the checkpoints of `workdir` belong to, as `Checkpoints` takes it.

    Raises:
      UserError: the mesh, the batches or the checkpoints do not fit, a frozen parameter would be a random number, or
        the loss or the state is no longer finite.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        mesh = make_mesh(training.mesh)
        check_batch_size(training.batch_size, mesh, training.micro_steps)
        learning_rate = jax.jit(learning_rate_schedule(training.optimizer, training.steps))
        rows = process_rows(training.batch_size, mesh)
        init_key, step_key, watch_key = jax.random.split(jax.random.key(training.seed), 3)

        def to_device(batch: HostBatch) -> dict[str, jax.Array]:
            return to_global(check_batch(model.inputs, batch), training.batch_size, mesh)

        stack.enter_context(jax.set_mesh(mesh))
        directory = workdir / "checkpoints"
        checkpoints = stack.enter_context(Checkpoints(directory, keep_last=training.keep_last, identity=identity))
        abstract, init, step_function = programs(model, training, mesh, frozen=frozen, frozen_dtype=frozen_dtype)
        state = restore(checkpoints, abstract)
        if state is None:
            given = {} if begin is None else begin(abstract)
            check_given(abstract.frozen, given)
            first = to_device(next(train_batches(rows, 0)))  # some families initialise from data
            state = init(init_key, first, given)
            save_frozen(directory, state.frozen, identity)
        else:
            state = state._replace(frozen=restore_frozen(directory, abstract.frozen, identity))
        start = step = int(state.step)
        if start >= training.steps:
            say(f"{workdir} already holds step {start} of {training.steps}: nothing is left to do")
            return state

        scored = () if validation is None else (validated(model, validation, mesh),)
        looking = (*scored, *watchers)
        log = stack.enter_context(MetricsLog(workdir, start, enabled=jax.process_index() == 0))
        bar = stack.enter_context(progress_bar(start, training.steps))
        batches = train_batches(rows, start)
        pending: list[tuple[int, dict[str, jax.Array]]] = []
        since = time.perf_counter()
        stop.poll()  # compiling and restoring may have taken minutes
        while step < training.steps and not stop.noticed:
            state, metrics = step_function(state, to_device(next(batches)), step_key)
            step += 1
            pending.append((step, metrics))
            scoring = step % training.checkpoint_every == 0 or step == training.steps
            saving = stop.poll() or scoring
            logging = step % training.log_every == 0 or saving
            if logging or step == start + 1:  # the first step compiles: the rate of the following ones is without it
                values = fetch_finite(pending, checkpoints)
                elapsed = time.perf_counter() - since
            if logging:
                values["learning_rate"] = float(learning_rate(step - 1))
                values["examples_per_second"] = len(pending) * training.batch_size / elapsed
                pictures: dict[str, np.ndarray] = {}
                if scoring and looking and not stop.noticed:
                    numbers, pictures = look(looking, Moment(eval_variables(state), watch_key, stop.poll))
                    values |= numbers
                log.write(step, values, pictures)
                bar.set_postfix_str(f"loss {values['loss']:.4g}, {values['examples_per_second']:.0f} examples/s")
            if saving:
                checkpoints.save(step, changing(state), validation_loss=values.get("validation_loss"))
            if logging or step == start + 1:
                pending.clear()
                since = time.perf_counter()
            bar.update()

        checkpoints.wait()
    if stop.noticed:
        saved = f"step {step} of {training.steps} is saved in {workdir}" if step else "no step was taken"
        say(f"stopped by a signal: {saved}; the same command goes on")
        sys.exit(0)
    return state


def restore(checkpoints: Checkpoints, abstract: TrainState) -> TrainState | None:
    """The newest good state, laid out as `abstract` says, but for what is frozen."""
    restored = checkpoints.restore(changing(abstract))
    return None if restored is None else TrainState(frozen=abstract.frozen, **restored[1])


def changing(state: TrainState) -> dict[str, Any]:
    """What each checkpoint holds of a state: all but the frozen parameters."""
    return {name: tree for name, tree in state._asdict().items() if name != "frozen"}


def check_given(frozen: PyTree, given: Mapping[str, jax.Array]) -> None:
    """Refuses to train around random numbers that never change.

    Raises:
      UserError: a frozen parameter is not given.
    """
    if drawn := [path for path in leaves_by_path(frozen) if f"params/{path}" not in given]:
        raise UserError(
            f"nothing fills {listed(drawn)}, which {'is' if len(drawn) == 1 else 'are'} frozen and would stay random: "
            f"begin from a run that has them (--init-from, or a start of the preset), or let them train"
        )


def fetch_finite(pending: list[tuple[int, dict[str, jax.Array]]], checkpoints: Checkpoints) -> dict[str, float]:
    """The newest of the pending steps' metrics as numbers, once all of them are known to be sound.

    Looked at together and not step by step, so that the device never waits for the host; before each save, so that
    what is saved is sound.

    Raises:
      UserError: a loss, the norm of a gradient or the state after the update is not finite.
    """
    values: dict[str, float] = {}
    for step, metrics in jax.device_get(pending):
        values = {name: float(value) for name, value in metrics.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise diverged(f"the {name} became {values[name]} at step {step}", checkpoints)
        if not values.pop("finite"):
            raise diverged(
                f"the parameters or what is kept beside them became nan or infinite at step {step}", checkpoints
            )
    return values


def diverged(what: str, checkpoints: Checkpoints) -> UserError:
    """The sentence that ends a run whose numbers are not finite."""
    steps = checkpoints.steps()
    kept = f"the last good checkpoint is {steps[-1]}" if steps else "no checkpoint was written yet"
    return UserError(
        f"{what} and nothing was saved since ({kept}): lower optimizer.learning_rate, clip gradients, or look at the "
        f"data of that step"
    )


ValidationLoss = Callable[[Variables, Batch, jax.Array, int], tuple[Float[jax.Array, ""], Float[jax.Array, ""]]]


def validation_loss(model: Model) -> ValidationLoss:
    """`(variables, batch, key, valid) -> (loss, weight)` of the first `valid` rows of a batch; one program for each."""

    def loss(
        variables: Variables, batch: Batch, key: jax.Array, valid: int
    ) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
        # Cut off here, where the array is one over all devices, and not masked: a loss knows no rows that do not count.
        value, aux = model.loss(variables, {name: x[:valid] for name, x in batch.items()}, key, 0, train=False)
        return value, jnp.float32(valid) if aux.weight is None else aux.weight

    return jax.jit(loss, static_argnames="valid")


def validated(model: Model, validation: Validation, mesh: Mesh) -> Watcher:
    """The mean loss over all items of the validation split, with the same noise at each call.

    Empty where a signal comes meanwhile: to save what was trained is more urgent than its score.

    A batch counts by its `Aux.weight`. A loss that spans its batch has none and counts by the examples: its value is
    the mean over batches of this size, and a smaller last one, in which there is less to confuse, counts for less.
    """
    loss, rows = validation_loss(model), process_rows(validation.batch_size, mesh)

    def validate(moment: Moment) -> dict[str, float]:
        parts = []
        for index, (batch, valid) in enumerate(validation.batches(rows)):
            if moment.stop():
                return {}
            fields = to_global(check_batch(model.inputs, batch), validation.batch_size, mesh)
            parts.append(loss(moment.variables, fields, jax.random.fold_in(moment.key, index), valid))
        losses, weights = np.asarray(jax.device_get(parts), np.float64).T
        return {"validation_loss": float(losses @ weights / np.sum(weights))}

    return validate
