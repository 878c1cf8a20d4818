"""AdamW and Adafactor beside their equations, schedules, what decays, rates by path, and settings that are refused."""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.errors import UserError
from vlm_jax.train.optim import Adafactor, Optimizer, learning_rate_schedule, make_optimizer
from vlm_jax.trees import leaves_by_path

PARAMS = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.25]]), "bias": jnp.array([0.1, -0.3])}


@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_steps_are_those_of_the_paper_with_gradients_of_unlike_norm(clip_norm: float | None) -> None:
    """1711.05101, algorithm 2, where each gradient above the limit is first scaled down to it."""
    settings: dict[str, Any] = {"b1": 0.8, "b2": 0.7, "eps": 0.03, "weight_decay": 0.2, "clip_norm": clip_norm}
    optimizer = make_optimizer(Optimizer(learning_rate=0.1, schedule="constant", **settings), 3)
    random = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), PARAMS)
    unit = math.sqrt(sum(float(np.sum(leaf**2)) for leaf in direction.values()))
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    expected = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS.items()}
    first, second = ({name: np.zeros_like(leaf) for name, leaf in expected.items()} for _ in range(2))
    for t, norm in enumerate((3.0, 0.5, 1.0), start=1):
        gradients = jax.tree.map(lambda leaf, norm=norm: jnp.float32(leaf * norm / unit), direction)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        kept = norm if clip_norm is None else min(norm, clip_norm)
        for name, leaf in expected.items():
            gradient = direction[name] * kept / unit
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.7 * second[name] + 0.3 * gradient**2
            step = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.7**t)) + 0.03)
            expected[name] = leaf - 0.1 * (step + (0.2 * leaf if name == "kernel" else 0))
        for name, leaf in expected.items():
            np.testing.assert_allclose(params[name], leaf, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_steps_and_state_are_those_of_optax(clip_norm: float | None) -> None:
    """The state's tree too, in which runs of before are resumed."""
    config = Optimizer(learning_rate=0.1, warmup_steps=2, weight_decay=0.2, clip_norm=clip_norm)
    ours = make_optimizer(config, 4)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    decays = {"kernel": True, "bias": False}
    theirs = optax.chain(clip, optax.adamw(learning_rate_schedule(config, 4), weight_decay=0.2, mask=decays))
    assert jax.tree.structure(ours.init(PARAMS)) == jax.tree.structure(theirs.init(PARAMS))

    def run(optimizer: optax.GradientTransformation) -> Any:
        params, state = PARAMS, optimizer.init(PARAMS)
        for scale in (2.0, 0.1, 0.7):
            gradients = jax.tree.map(lambda leaf, scale=scale: scale * jnp.sin(leaf), params)
            updates, state = jax.jit(optimizer.update)(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run(ours), run(theirs))


def test_a_gradient_of_zero_is_not_clipped_to_nan() -> None:
    optimizer = make_optimizer(Optimizer(learning_rate=0.1), 3)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    for leaf in updates.values():
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        *(("learning_rate", value, "choose a finite rate, 0 or more") for value in (-1e-3, math.inf, math.nan)),
        ("warmup_steps", -1, "choose 0 steps or more"),
        *(("decay_steps", value, "choose 1 step or more, or None") for value in (-5, 0)),
        *(
            (name, value, "choose a number from 0 up to, but not, 1")
            for name in ("b1", "b2")
            for value in (-0.1, 1.0, 1.5, math.nan)
        ),
        *(("eps", value, "choose a finite number above 0") for value in (-1e-8, 0.0, math.inf, math.nan)),
        *(("weight_decay", value, "choose a finite number, 0 or more") for value in (-0.1, math.inf, math.nan)),
        *(("clip_norm", value, "choose a finite number above 0 or None") for value in (-1, 0, math.inf, math.nan)),
        ("decay_pattern", "(", "choose a regular expression, which '(' is not"),
        ("multiples", (("head", 10.0), ("[", 1.0)), "choose a regular expression, which '[' is not"),
        *(
            ("multiples", (("head", value),), "choose finite numbers above 0; what must not train at all is --frozen")
            for value in (0.0, -1.0, math.inf, math.nan)
        ),
    ],
)
def test_settings_out_of_their_range_are_refused_by_name(name: str, value: Any, mend: str) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-3, name: value}
    with pytest.raises(UserError) as refused:
        Optimizer(**settings)
    assert str(refused.value).startswith(f"the optimizer's {name} is {value}: {mend}")


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        ("learning_rate", -1.0, "choose a finite rate, 0 or more"),
        ("b1", 1.0, "choose a number from 0 up to, but not, 1"),
        ("b2", math.nan, "choose a number from 0 up to, but not, 1"),
        ("eps", 0.0, "choose a finite number above 0"),
        *(("clip_rms", value, "choose a finite number above 0 or None") for value in (0.0, math.inf)),
        ("factored_from", 0, "choose 1 or more"),
    ],
)
def test_settings_of_adafactor_out_of_their_range_are_refused_by_name(name: str, value: Any, mend: str) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-3, name: value}
    with pytest.raises(UserError, match=re.escape(f"the optimizer's {name} is {value}: {mend}")):
        Adafactor(**settings)


def test_schedules_warm_up_and_end_at_zero() -> None:
    cosine = learning_rate_schedule(Optimizer(learning_rate=2.0, warmup_steps=4), 20)
    np.testing.assert_allclose([cosine(i) for i in range(4)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose([cosine(4), cosine(12), cosine(20)], [2.0, 1.0, 0.0], atol=1e-6)
    linear = learning_rate_schedule(Optimizer(learning_rate=2.0, schedule="linear", decay_steps=10), 20)
    np.testing.assert_allclose([linear(0), linear(5), linear(10), linear(15)], [2.0, 1.0, 0.0, 0.0], atol=1e-6)
    constant = learning_rate_schedule(Optimizer(learning_rate=2.0, schedule="constant"), 20)
    assert constant(0) == constant(100) == 2.0


def test_a_run_shorter_than_its_warm_up_ends_within_it() -> None:
    schedule = learning_rate_schedule(Optimizer(learning_rate=1.0, warmup_steps=50), 10)
    np.testing.assert_allclose([schedule(i) for i in range(10)], [(i + 1) / 50 for i in range(10)], rtol=1e-6)


def test_weight_decay_spares_gains_biases_and_temperatures() -> None:
    """With a gradient of zero, AdamW moves what decays and nothing else."""
    optimizer = make_optimizer(Optimizer(learning_rate=0.1, schedule="constant", weight_decay=0.5), 5)
    params = {"a": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0}, "embedding": 1.0, "log_scale": 1.0}
    params = jax.tree.map(jnp.float32, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {path: float(update) for path, update in leaves_by_path(updates).items()}
    assert moved == {
        "a/bias": 0,
        "a/kernel": pytest.approx(-0.05),
        "embedding": pytest.approx(-0.05),
        "log_scale": 0,
        "norm/scale": 0,
    }


def moved(config: Optimizer | Adafactor, params: Any, steps: int = 3) -> dict[str, Any]:
    """How far each leaf moves in a few steps of unlike gradients."""
    optimizer, start = make_optimizer(config, steps), params
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for scale in (2.0, 0.1, 0.7)[:steps]:
        gradients = jax.tree.map(lambda leaf, scale=scale: scale * jnp.sin(3 * leaf), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return leaves_by_path(jax.tree.map(lambda end, begin: np.asarray(end - begin), params, start))


TREE = {"head": PARAMS, "image": {"head": PARAMS, "body": PARAMS}, "text": PARAMS}


@pytest.mark.parametrize("kind", [Optimizer, Adafactor])
def test_a_leaf_moves_as_it_would_at_its_multiple_of_the_rate(kind: type[Optimizer] | type[Adafactor]) -> None:
    """Weight decay and schedule too. Of several patterns the first counts, and a leaf without one has the rate."""
    config = kind(learning_rate=0.01, warmup_steps=2, weight_decay=0.5, clip_norm=None)
    multiples = (("^image/body/kernel", 3.0), ("^image/", 0.25), ("head", 10.0))
    actual = moved(replace(config, multiples=multiples), TREE)
    for path, value in actual.items():
        multiple = next((factor for pattern, factor in multiples if re.search(pattern, path)), 1)
        # Alone, so that its gradients are those of its own way.
        alone = moved(replace(config, learning_rate=0.01 * multiple), {path: leaves_by_path(TREE)[path]})
        np.testing.assert_allclose(value, alone[path], rtol=1e-5, atol=1e-7, err_msg=path)
    assert len({float(np.ravel(value)[0]) for value in actual.values()}) > 4


def test_clipping_is_by_the_norm_of_all_gradients_whatever_their_multiples() -> None:
    config = Optimizer(learning_rate=1.0, schedule="constant", clip_norm=0.1, eps=1.0)
    plain, multiplied = (moved(replace(config, multiples=each), TREE, 1) for each in ((), (("text", 2.0),)))
    for path, value in multiplied.items():
        np.testing.assert_allclose(value, plain[path] * (2 if "text" in path else 1), rtol=1e-4, err_msg=path)


def test_a_pattern_of_no_leaf_is_refused_by_its_name() -> None:
    """Also where all of its leaves are frozen: the optimizer sees those that train alone."""
    optimizer = make_optimizer(Optimizer(learning_rate=0.1, multiples=(("bias", 2.0), ("^visoin/", 0.1))), 3)
    with pytest.raises(UserError, match=r"multiples have '\^visoin/', which .* that trains: there are bias, kernel"):
        optimizer.init(PARAMS)


def test_adafactor_is_that_of_the_paper_with_a_cap_and_momentum() -> None:
    """1804.04235, algorithm 4, for a matrix and a vector, with the absolute rate, cap and momentum of 2106.04560."""
    settings: dict[str, Any] = {"b1": 0.5, "b2": 0.45, "eps": 0.01, "weight_decay": 0.2, "clip_norm": None}
    config = Adafactor(learning_rate=0.1, schedule="constant", factored_from=3, clip_rms=0.8, **settings)
    optimizer, random = make_optimizer(config, 4), np.random.default_rng(0)
    expected = {"kernel": random.normal(size=(3, 5)), "bias": random.normal(size=4)}
    params = jax.tree.map(jnp.float32, expected)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    rows, columns, whole = np.zeros(3), np.zeros(5), np.zeros(4)
    momentum = {name: np.zeros_like(leaf) for name, leaf in expected.items()}
    for t in range(1, 5):
        gradients = {name: random.normal(size=leaf.shape) for name, leaf in expected.items()}
        updates, state = update(jax.tree.map(jnp.float32, gradients), state, params)
        params = optax.apply_updates(params, updates)
        keep = min(0.45, 1 - t**-0.8)
        square = gradients["kernel"] ** 2 + 0.01
        rows, columns = (keep * old + (1 - keep) * square.mean(axis) for old, axis in ((rows, 1), (columns, 0)))
        whole = keep * whole + (1 - keep) * (gradients["bias"] ** 2 + 0.01)
        second = {"kernel": np.outer(rows, columns) / rows.mean(), "bias": whole}
        for name in expected:
            step = gradients[name] / np.sqrt(second[name])
            step /= max(1, np.sqrt(np.mean(step**2)) / 0.8)
            mean = 0.5 * momentum[name] + 0.5 * step
            momentum[name] = np.asarray(mean.astype(jnp.bfloat16), np.float64)
            expected[name] = expected[name] - 0.1 * (mean + (0.2 * expected[name] if name == "kernel" else 0))
            # In float32 a mean may round to the other neighbour in bfloat16, which is 1/256 of it away.
            np.testing.assert_allclose(params[name], expected[name], rtol=2e-3, atol=2e-4)


def test_adafactor_keeps_half_the_bytes_of_its_parameters_and_little_more() -> None:
    optimizer = make_optimizer(Adafactor(learning_rate=0.1), 3)
    params = {"kernel": jax.ShapeDtypeStruct((12, 256, 512), jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert held / params["kernel"].size / 4 == pytest.approx(0.5, abs=0.01)
