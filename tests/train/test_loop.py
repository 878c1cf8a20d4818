"""The loop: exact resumption, the record of metrics, validation, signals, and refusals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.contract import Aux, Input, Model
from vlm_jax.errors import UserError
from vlm_jax.sharding import MeshShape, make_mesh
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.loop import Validation, fit, validated
from vlm_jax.train.optim import Adafactor, Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.train.terminal import StopSignal
from vlm_jax.train.watch import Interrupted, Moment, harmless
from vlm_jax.trees import leaves_by_path


def noisy_regression() -> Model:
    """A linear model with noise in its loss: as small as a model gets that draws randomness."""

    def init(key: jax.Array, batch: dict) -> dict:
        return {"params": {"kernel": jax.random.normal(key, (8, 8))}}

    def loss(variables: dict, batch: dict, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        noise = jax.random.normal(key, batch["x"].shape)
        error = batch["x"] @ variables["params"]["kernel"] - batch["x"] + 0.1 * noise
        return jnp.mean(jnp.square(error)), Aux({"noise": noise[0, 0]}, jnp.float32(len(error)))

    return Model(inputs={"x": Input((8,), "float32")}, init=init, loss=loss, rules=(("kernel$", ("embed", None)),))


def train_batches(rows: np.ndarray, start: int) -> Iterator[dict[str, np.ndarray]]:
    step = start
    while True:
        yield {"x": np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32)[rows]}
        step += 1


def training(**fields: object) -> Training:
    settings = {"steps": 12, "batch_size": 16, "checkpoint_every": 4, "log_every": 1, "ema_decay": 0.9} | fields
    return Training(**{"optimizer": Optimizer(learning_rate=0.01, decay_steps=12), **settings})


def leaves(state: object) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(state._asdict()).items()}


def logged(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Stands for a kill: nothing of the loop's handles it."""


def killed_at(step: int) -> object:
    def batches(rows: np.ndarray, start: int) -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(train_batches(rows, start), start):
            if index == step:
                raise Killed
            yield batch

    return batches


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list]:
    """The final state and the metrics of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    state = fit(noisy_regression(), training(), workdir, train_batches)
    return leaves(state), logged(workdir)


def test_interrupted_twice_is_bit_identical_and_logs_each_step_once(whole: tuple, tmp_path: Path) -> None:
    for step in (6, 11):
        with pytest.raises(Killed):
            fit(noisy_regression(), training(), tmp_path, killed_at(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a kill can cut a line short
    actual = leaves(fit(noisy_regression(), training(), tmp_path, train_batches))
    expected, metrics = whole
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
    timing = "examples_per_second"
    without_timing = [
        [{k: v for k, v in line.items() if k != timing} for line in run] for run in (logged(tmp_path), metrics)
    ]
    assert without_timing[0] == without_timing[1]
    assert [line["step"] for line in metrics] == list(range(1, 13))


def test_adafactor_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """With momentum in bfloat16 and factored moments in its checkpoints."""
    settings = training(optimizer=Adafactor(learning_rate=0.01, factored_from=8, decay_steps=12))
    expected = leaves(fit(noisy_regression(), settings, tmp_path / "whole", train_batches))
    with pytest.raises(Killed):
        fit(noisy_regression(), settings, tmp_path / "killed", killed_at(6))
    actual = leaves(fit(noisy_regression(), settings, tmp_path / "killed", train_batches))
    assert {leaf.dtype.name for path, leaf in actual.items() if "/ema/" in path} == {"bfloat16"}
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def test_goes_on_with_another_mesh_and_longer(whole: tuple, tmp_path: Path) -> None:
    mesh = MeshShape(data=2, fsdp=2, tensor=2)
    fit(noisy_regression(), training(steps=6, mesh=mesh), tmp_path, train_batches)
    actual = leaves(fit(noisy_regression(), training(mesh=MeshShape(data=1, fsdp=8)), tmp_path, train_batches))
    for path, value in whole[0].items():
        np.testing.assert_allclose(actual[path], value, atol=1e-5, err_msg=path)


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(noisy_regression(), training(steps=4), tmp_path, train_batches)
    before = logged(tmp_path)
    fit(noisy_regression(), training(steps=4), tmp_path, killed_at(0))
    assert "already holds step 4 of 4" in capsys.readouterr().out
    assert logged(tmp_path) == before


def test_termination_saves_the_step_and_the_same_call_goes_on(
    whole: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def terminated(rows: np.ndarray, start: int) -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(train_batches(rows, start), start):
            if index == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        fit(noisy_regression(), training(), tmp_path, terminated)
    assert stopped.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert "step 6 of 12 is saved" in capsys.readouterr().out
    actual = leaves(fit(noisy_regression(), training(), tmp_path, killed_at(12)))
    for path, value in whole[0].items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


@pytest.mark.parametrize("when", ["before", "during"])
def test_what_was_trained_is_saved_before_it_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture, when: str
) -> None:
    """A signal that comes before a validation or while it goes on: its other batches are not even read."""
    read = []

    def terminated(rows: np.ndarray, start: int) -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(train_batches(rows, start), start):
            if index == 3 and when == "before":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def batches(rows: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        for index in range(5):
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            read.append(index)
            yield {"x": np.ones((8, 8), np.float32)}, 8

    with pytest.raises(SystemExit) as stopped:
        fit(noisy_regression(), training(), tmp_path, terminated, Validation(batches, 8))
    assert stopped.value.code == 0
    assert "step 4 of 12 is saved" in capsys.readouterr().out
    assert read == ([] if when == "before" else [0, 1])
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == (4,) and checkpoints.best_step() is None
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_initialisation_compiles_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, number: signal.Signals
) -> None:
    model = noisy_regression()

    def init(key: jax.Array, batch: dict) -> dict:
        os.kill(os.getpid(), number)  # once: what is traced for the shapes is what is compiled
        return model.init(key, batch)

    with pytest.raises(SystemExit) as stopped:
        fit(replace(model, init=init), training(), tmp_path, train_batches)
    assert stopped.value.code == 0
    assert "stopped by a signal: no step was taken" in capsys.readouterr().out
    assert logged(tmp_path) == [] and not list(tmp_path.glob("checkpoints/[0-9]*"))


def test_the_second_interrupt_ends_the_process_whatever_it_is_busy_with() -> None:
    """Here with a call that, like a compiler, gives Python's own handlers no chance to run."""
    busy = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    script = f"from vlm_jax.train.terminal import StopSignal\nwith StopSignal():\n  print('go', flush=True)\n  {busy}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C once more stops at once" in process.stdout.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


def test_logs_that_cannot_be_written_stop_no_run(
    whole: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk under each of them, and under what is shown."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "tensorboard").symlink_to("/dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        actual = leaves(fit(noisy_regression(), training(), tmp_path, train_batches))
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    for path, value in whole[0].items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
    events, lines = caplog.messages
    assert events.startswith(f"{tmp_path}/tensorboard/events.out.tfevents.")
    assert lines == f"{tmp_path}/metrics.jsonl cannot be written (No space left on device): the run goes on without it"


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path, log_every: int) -> None:
    """Also when it appears between two lines of the log."""

    def poisoned(rows: np.ndarray, start: int) -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(train_batches(rows, start), start):
            yield {"x": batch["x"] * (np.nan if index == 5 else 1)}

    with pytest.raises(UserError, match=r"became nan at step 6 .*the last good checkpoint is 4.*learning_rate"):
        fit(noisy_regression(), training(log_every=log_every), tmp_path, poisoned)
    state = fit(noisy_regression(), training(steps=5), tmp_path, train_batches)
    assert all(np.isfinite(leaf).all() for leaf in leaves(state).values())


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    """A finite loss with such a gradient spoils the parameters that the same step saves."""
    model = noisy_regression()

    def loss(variables: dict, batch: dict, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        return jnp.sqrt(jnp.sum(jnp.square(0 * variables["params"]["kernel"]))), Aux({}, jnp.float32(1))

    with pytest.raises(UserError, match=r"grad_norm became nan at step 1 .*no checkpoint was written yet"):
        fit(replace(model, loss=loss), training(checkpoint_every=1), tmp_path, train_batches)
    assert not list(tmp_path.glob("checkpoints/1"))


@pytest.mark.parametrize("spoiled", ["params", "state"])
def test_an_update_that_is_not_finite_is_not_saved(tmp_path: Path, spoiled: str) -> None:
    """Though the loss and the gradient were finite before it."""
    model, settings = noisy_regression(), training(checkpoint_every=1, ema_decay=None)
    if spoiled == "params":
        settings = replace(settings, optimizer=replace(settings.optimizer, learning_rate=3e38, weight_decay=3e38))

    def init(key: jax.Array, batch: dict) -> dict:
        return {**model.init(key, batch), "statistics": {"count": jnp.ones(())}}

    def loss(variables: dict, batch: dict, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        value, aux = model.loss(variables, batch, key, step, train=train)
        count = variables["statistics"]["count"]
        return value, aux._replace(state={"statistics": {"count": count / 0 if spoiled == "state" else count}})

    with pytest.raises(UserError, match=r"became nan or infinite at step 1 .*no checkpoint was written yet.*learning_"):
        fit(replace(model, init=init, loss=loss), settings, tmp_path, train_batches)
    assert not list(tmp_path.glob("checkpoints/[0-9]*"))


def test_validation_scores_each_checkpoint_and_keeps_the_best(tmp_path: Path) -> None:
    """Of rows that are there to fill up the last batch, none counts."""
    model = noisy_regression()

    def loss(variables: dict, batch: dict, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        value, aux = model.loss(variables, batch, key, step, train=train)
        worse_after_step_4 = jnp.abs(jnp.sum(variables["params"]["kernel"]) * 0 + jnp.mean(batch["x"]))
        return (value if train else worse_after_step_4), aux

    scores = iter((3.0, 1.0, 2.0))

    def batches(rows: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        score = next(scores)
        yield {"x": np.full((8, 8), score, np.float32)[rows]}, 8
        yield {"x": np.where(np.arange(8) < 5, score, 99).astype(np.float32)[rows, None] * np.ones((1, 8), "f")}, 5

    validation = Validation(batches, 8)
    fit(replace(model, loss=loss), training(keep_last=1), tmp_path, train_batches, validation)
    logged_scores = {line["step"]: line["validation_loss"] for line in logged(tmp_path) if "validation_loss" in line}
    assert logged_scores == {4: 3.0, 8: 1.0, 12: 2.0}
    assert sorted(path.name for path in tmp_path.glob("checkpoints/[0-9]*")) == ["12", "8"]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("examples", [5, 8, 21])
def test_validation_is_the_mean_over_all_items_wherever_they_lie(examples: int, devices: int) -> None:
    """With masks of unlike numbers of items, and a last batch that the devices cannot split evenly."""
    random = np.random.default_rng(0)
    x = random.normal(size=(examples, 6)).astype(np.float32)
    mask = random.random((examples, 6)) < np.linspace(0.1, 0.9, examples)[:, None]

    def loss(variables: dict, batch: dict, key: jax.Array, step: int, *, train: bool) -> tuple[jax.Array, Aux]:
        weight = jnp.sum(batch["mask"], dtype=jnp.float32)
        return jnp.sum(jnp.square(batch["x"]), where=batch["mask"] > 0) / jnp.maximum(weight, 1), Aux({}, weight)

    inputs = {"x": Input((6,), "float32"), "mask": Input((6,), "int32", 2)}
    score = validation_of(replace(noisy_regression(), inputs=inputs, loss=loss), {"x": x, "mask": mask}, devices)
    assert score == pytest.approx(np.mean(np.square(x[mask], dtype=np.float64)), rel=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_validation_of_a_loss_that_spans_its_batch_weighs_batches_by_their_examples(devices: int) -> None:
    x = np.random.default_rng(0).normal(size=(13, 6)).astype(np.float32)

    def loss(variables: dict, batch: dict, key: jax.Array, step: int, *, train: bool) -> tuple[jax.Array, Aux]:
        return jnp.max(batch["x"]), Aux({})

    model = replace(noisy_regression(), inputs={"x": Input((6,), "float32")}, loss=loss)
    expected = (8 * float(x[:8].max()) + 5 * float(x[8:].max())) / 13
    assert validation_of(model, {"x": x}, devices) == pytest.approx(expected, rel=1e-6)


def validation_of(model: Model, data: dict[str, np.ndarray], devices: int) -> float:
    """Of all of `data`, in batches of 8."""
    examples = len(data["x"])

    def batches(rows: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        for first in range(0, examples, 8):
            read = np.minimum(first + rows, examples - 1)
            yield (
                {n: values[read].astype(model.inputs[n].dtype) for n, values in data.items()},
                min(8, examples - first),
            )

    mesh, key = make_mesh(MeshShape(), jax.devices()[:devices]), jax.random.key(0)
    with jax.set_mesh(mesh), StopSignal() as stop:
        return validated(model, Validation(batches, 8), mesh)(Moment({}, key, stop.poll))["validation_loss"]


def test_watchers_are_shown_each_checkpoint_and_what_they_see_is_logged(whole: tuple, tmp_path: Path) -> None:
    """They change no step."""
    picture, kernels = np.zeros((2, 3, 3), np.uint8), []

    def norm(moment: Moment) -> dict[str, float | np.ndarray]:
        kernels.append(np.asarray(moment.variables["params"]["kernel"]))
        return {"norm": float(np.linalg.norm(kernels[-1])), "picture": picture}

    state = fit(noisy_regression(), training(), tmp_path, train_batches, watchers=(norm,))
    assert {line["step"]: line["norm"] for line in logged(tmp_path) if "norm" in line} == {
        step: pytest.approx(np.linalg.norm(kernel)) for step, kernel in zip((4, 8, 12), kernels, strict=True)
    }
    np.testing.assert_array_equal(kernels[-1], state.ema["kernel"])
    assert not any("picture" in line for line in logged(tmp_path))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"\x89PNG") == 3
    for path, value in leaves(state).items():
        np.testing.assert_array_equal(value, whole[0][path], err_msg=path)


def test_a_watcher_that_fails_is_told_once_and_stops_no_run(
    whole: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, for what failed may have been the disk or the memory."""
    calls = []

    def failing(moment: Moment) -> dict[str, float]:
        calls.append(moment)
        if len(calls) < 3:
            raise ValueError("no\nluck")
        return {"luck": 1.0}

    state = fit(noisy_regression(), training(), tmp_path, train_batches, watchers=(harmless("luck", failing),))
    assert caplog.messages == ["luck failed (ValueError: no luck): the run goes on without it"]
    assert [line["step"] for line in logged(tmp_path) if "luck" in line] == [12]
    for path, value in leaves(state).items():
        np.testing.assert_array_equal(value, whole[0][path], err_msg=path)


def test_a_signal_is_more_urgent_than_what_watchers_see(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    later = []

    def interrupted(moment: Moment) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise Interrupted

    watchers = (harmless("first", interrupted), lambda moment: later.append(moment) or {})
    with pytest.raises(SystemExit):
        fit(noisy_regression(), training(), tmp_path, train_batches, watchers=watchers)
    assert not later and "step 4 of 12 is saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 12}, "batch size 12 cannot be split over 8 devices .*multiple of 8"),
        ({"micro_steps": 3}, "8 devices .* times 3 micro-steps: choose a multiple of 24"),
        ({"mesh": MeshShape(data=3)}, "needs 3 devices and there are 8"),
        ({"mesh": MeshShape(fsdp=16)}, "needs 16 devices and there are 8"),
    ],
)
def test_refuses_what_the_mesh_cannot_split(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(noisy_regression(), training(**fields), tmp_path, train_batches)
    assert not list(tmp_path.iterdir())


def test_refuses_values_outside_the_vocabulary(tmp_path: Path) -> None:
    model = replace(noisy_regression(), inputs={"x": Input((8,), "float32", 2)})
    with pytest.raises(UserError, match=r"the field 'x' holds the value .*, outside \[0, 2\)"):
        fit(model, training(), tmp_path, train_batches)
