"""The train step: one trajectory on any mesh, exact accumulation, averages, frozen subsets, mutable state."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smallest import CONFIGS as SMALLEST
from vlm_jax.contract import Aux, Input, Model
from vlm_jax.errors import UserError
from vlm_jax.models import build, chameleon, clip, language, vae
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.nn.quantize import FSQ
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.objectives.language import cross_entropy, token_scores
from vlm_jax.sharding import MeshShape, make_mesh, to_global
from vlm_jax.train.optim import Adafactor, Optimizer, clip_by_global_norm, make_optimizer, optimizer_shardings
from vlm_jax.train.step import eval_variables, init_train_state, make_train_step, train_state_shardings
from vlm_jax.trees import leaves_by_path

TOWER = Transformer(width=16, depth=1, heads=2, mlp=32)
CLIP = clip.Config(
    image=VisionTransformer(image_size=8, patch_size=4, transformer=TOWER),
    text=clip.TextTransformer(vocab_size=24, context_length=6, eos_id=2, transformer=TOWER),
    embedding=16,
)
VAE = vae.Config(image_size=8, channels=1, levels=17, latent=8, widths=(16, 32), mixtures=2)
LANGUAGE = language.Config(
    vocab_size=24,
    context_length=8,
    eos_id=2,
    decoder=DecoderConfig(width=16, depth=1, heads=4, kv_heads=2, head_width=4, mlp=32),
)


def split_by_two(config: Any) -> Any:
    """With a vocabulary that two devices can split, and codes that are no means of a first batch: of so few images some
    of those are the same but for rounding."""
    config = replace(config, language=replace(config.language, vocab_size=12))
    if not isinstance(config, chameleon.Config):
        return config
    return replace(config, first=replace(config.first, quantizer=FSQ(levels=(5,))))


MIXED = {
    name: split_by_two(config) for name, config in SMALLEST.items() if name.startswith(("chameleon", "transfusion"))
}


def batch_of(config: object, size: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if config in MIXED.values():
        return rows_with_images(config, size, seed)
    if config is LANGUAGE:
        tokens, target = rng.integers(3, 24, (size, 8), np.int32), rng.random((size, 8)) < 0.6
        return {"tokens": tokens, "target": target, "segment": np.tile(np.int32([1, 1, 1, 2, 2, 2, 2, 0]), (size, 1))}
    batch = {"image": rng.integers(0, 17, (size, 8, 8, 1 if config is VAE else 3), np.uint8)}
    if config is CLIP:
        batch["tokens"] = rng.integers(3, 24, (size, 6), np.int32)
        batch["tokens"][:, 4] = 2
    return batch


def rows_with_images(config: object, size: int, seed: int) -> dict[str, np.ndarray]:
    """Each of one document: a token, an image, and texts to the end, all of which is to be predicted."""
    rng, inputs = np.random.default_rng(seed), build(config).inputs
    batch = {name: rng.integers(0, inputs[name].limit, (size, *inputs[name].shape)) for name in ("tokens", "image")}
    length = batch["tokens"].shape[1]
    image_at = np.full((size, *inputs["image_at"].shape), length, np.int32)
    image_at[:, 0] = 1
    target = np.tile(np.arange(length) > 0, (size, 1))
    batch |= {"target": target, "segment": np.ones_like(batch["tokens"]), "image_at": image_at}
    return {name: value.astype(inputs[name].dtype) for name, value in batch.items()}


ADAMW = Optimizer(learning_rate=1e-3, weight_decay=0.1, eps=1e-6)
ADAFACTOR = Adafactor(learning_rate=1e-3, weight_decay=0.1, eps=1e-12, factored_from=8)


def trajectory(
    config: object, optimizing: Optimizer | Adafactor, mesh: MeshShape, devices: int, steps: int = 10
) -> dict[str, np.ndarray]:
    """Parameters after `steps` steps on a mesh."""
    model = build(config)
    optimizer = make_optimizer(optimizing, steps)
    on = make_mesh(mesh, jax.devices()[:devices])
    with jax.set_mesh(on):
        init = partial(init_train_state, model, optimizer, ema_decay=0.9)
        first = to_global(batch_of(config, 16, 0), 16, on)
        shardings = train_state_shardings(model, optimizer, jax.eval_shape(init, jax.random.key(0), first), on)
        state = jax.jit(init, out_shardings=shardings)(jax.random.key(0), first)
        step = jax.jit(
            make_train_step(model, optimizer, ema_decay=0.9), donate_argnums=0, out_shardings=(shardings, None)
        )
        for i in range(steps):
            state, _ = step(state, to_global(batch_of(config, 16, i), 16, on), jax.random.key(1))
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(state._asdict()).items()}


@pytest.mark.parametrize(
    ("config", "optimizing"),
    [
        (CLIP, ADAMW),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((CLIP, ADAFACTOR), (LANGUAGE, ADAMW), (VAE, ADAMW))),
        # Queries and keys of so little width have gradients of 1e-7: what rounding makes of those is no direction.
        *(pytest.param(config, replace(ADAMW, eps=1e-4), marks=pytest.mark.slow) for config in MIXED.values()),
    ],
    ids=["clip", "clip by adafactor", "language", "vae", *MIXED],
)
def test_one_trajectory_on_one_and_eight_devices(config: object, optimizing: Optimizer | Adafactor) -> None:
    """The contrastive loss spans the global batch, and the VAE draws noise inside the loss, as do the models of texts
    and images, of which one moves an average of itself besides."""
    expected = trajectory(config, optimizing, MeshShape(), 1)
    actual = trajectory(config, optimizing, MeshShape(data=2, fsdp=2, tensor=2), 8)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        # A mean of updates of about 1 in bfloat16 may round to a neighbour, which is 1/256 away.
        atol = 1 / 128 if value.dtype == jnp.bfloat16 else 1e-4
        np.testing.assert_allclose(*np.float64((actual[path], value)), atol=atol, err_msg=path)


def test_factored_moments_lie_by_the_dimensions_that_they_keep() -> None:
    """Also of a square matrix, of a scanned stack, and of the row factor of a kernel that is wider than long."""
    mesh, optimizer = make_mesh(MeshShape(data=2, fsdp=2, tensor=2)), make_optimizer(ADAFACTOR, 1)
    params = {
        "long": jnp.zeros((32, 8)),
        "wide": jnp.zeros((8, 32)),
        "square": jnp.zeros((16, 16)),
        "stacked": jnp.zeros((3, 16, 8)),
        "small": jnp.zeros((4, 32)),
        "bias": jnp.zeros(16),
        "one": jnp.zeros(1),
    }
    axes = {"bias": ("tensor",), "one": (), "stacked": (None, "fsdp", "tensor")}
    layouts = {path: NamedSharding(mesh, PartitionSpec(*axes.get(path, ("fsdp", "tensor")))) for path in params}
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = optimizer.init(params)
    shardings = optimizer_shardings(optimizer, state, params, layouts, everywhere)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    factored, momentum = shardings[1][0][0], shardings[1][0][2].ema
    assert momentum == layouts
    one, other = PartitionSpec("fsdp"), PartitionSpec("tensor")
    specs = {path: (factored.v_row[path].spec, factored.v_col[path].spec) for path in params}
    # v_row has lost the largest dimension and v_col the second largest; of equal ones the last counts as larger.
    assert specs["long"] == (other, one)
    assert specs["wide"] == specs["square"] == (one, other)
    assert specs["stacked"] == (PartitionSpec(None, "tensor"), PartitionSpec(None, "fsdp"))
    assert all(specs[path] == (PartitionSpec(), PartitionSpec()) for path in ("small", "bias", "one"))
    assert {path for path in params if factored.v[path] == layouts[path]} == {"small", "bias", "one"}
    # Each names the dimensions that the moment has, so that it can be laid out so.
    laid = jax.tree.map(lambda moment, sharding: sharding.shard_shape(moment.shape), state, shardings)
    assert laid[1][0][0].v_row["stacked"] == (3, 4) and laid[1][0][0].v_col["stacked"] == (3, 8)


def language_model(weight: bool = True) -> Model:
    """A linear next-token model, without randomness, whose targets are masked unequally."""

    def init(key: jax.Array, batch: object) -> dict:
        return {"params": {"table": 0.1 * jax.random.normal(key, (5, 5))}, "counts": {"calls": jnp.zeros(())}}

    def loss(variables: dict, batch: dict, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        logits = variables["params"]["table"][batch["tokens"]]
        value, metrics, count = cross_entropy(token_scores(logits, batch["targets"]), batch["mask"])
        state = {"counts": {"calls": variables["counts"]["calls"] + 1}}
        return value, Aux(metrics, count if weight else None, state)

    field = Input((6,), "int32", 5)
    rules = (("table$", (None, None)),)
    return Model(inputs={"tokens": field, "targets": field}, init=init, loss=loss, rules=rules)


def language_batch() -> dict[str, jax.Array]:
    tokens, targets = jax.random.split(jax.random.key(3))
    lengths = jnp.array([6, 1, 0, 2, 5, 1, 3, 6])
    return {
        "tokens": jax.random.randint(tokens, (8, 6), 0, 5),
        "targets": jax.random.randint(targets, (8, 6), 0, 5),
        "mask": jnp.arange(6) < lengths[:, None],
    }


def run_language(micro_steps: int) -> tuple:
    model, optimizer = language_model(), optax.sgd(1.0)
    state = init_train_state(model, optimizer, jax.random.key(0), language_batch())
    step = jax.jit(make_train_step(model, optimizer, micro_steps=micro_steps))
    return step(state, language_batch(), jax.random.key(1))


@pytest.mark.parametrize("micro_steps", [2, 4, 8])
def test_accumulation_is_exact_with_unequal_masks(micro_steps: int) -> None:
    """Also where a part has no target at all. With plain SGD the parameters are the gradient."""
    whole, whole_metrics = run_language(1)
    parts, parts_metrics = run_language(micro_steps)
    np.testing.assert_allclose(parts.params["table"], whole.params["table"], atol=1e-6)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(parts_metrics[name], value, atol=1e-6, err_msg=name)
    assert parts.collections["counts"]["calls"] == micro_steps


def test_each_part_of_a_batch_draws_for_itself() -> None:
    """Of a loss that is a draw from the standard normal: a mean of four has a quarter of the variance."""

    def loss(variables: dict, batch: dict, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        value = jax.random.normal(key) + 0.0 * variables["params"]["table"].sum()
        return value, Aux({}, jnp.float32(len(batch["tokens"])), {"counts": variables["counts"]})

    model, optimizer, draws = replace(language_model(), loss=loss), optax.sgd(0.0), 4000
    state = init_train_state(model, optimizer, jax.random.key(0), language_batch())
    for micro_steps in (1, 4):
        step = make_train_step(model, optimizer, micro_steps=micro_steps)
        losses = jax.jit(jax.vmap(lambda key, step=step: step(state, language_batch(), key)[1]["loss"]))
        values = losses(jax.random.split(jax.random.key(1), draws))
        assert abs(values.var() * micro_steps - 1) < 5 * math.sqrt(2 / draws)


def test_parts_are_strided() -> None:
    """Contiguous parts would each lie on a few of the devices."""
    model = replace(
        language_model(),
        loss=lambda variables, batch, key, step, train: (
            0.0 * variables["params"]["table"].sum(),
            Aux({}, jnp.float32(1), {"counts": {"calls": variables["counts"]["calls"] * 100 + batch["index"].sum()}}),
        ),
    )
    state = init_train_state(model, optax.sgd(1.0), jax.random.key(0), {})
    step = make_train_step(model, optax.sgd(1.0), micro_steps=2)
    state, _ = step(state, {"index": jnp.arange(4)}, jax.random.key(0))
    assert state.collections["counts"]["calls"] == (0 + 2) * 100 + (1 + 3)


def test_accumulation_refuses_a_loss_that_spans_the_batch() -> None:
    model = build(CLIP)
    optimizer = optax.sgd(1.0)
    batch = batch_of(CLIP, 4, 0)
    state = jax.eval_shape(lambda key: init_train_state(model, optimizer, key, batch), jax.random.key(0))
    step = make_train_step(model, optimizer, micro_steps=2)
    with pytest.raises(UserError, match=r"spans the whole batch.*set micro_steps to 1"):
        jax.eval_shape(step, state, batch, jax.random.key(0))


def test_accumulation_refuses_parts_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="micro_steps=3 does not divide the batch of 8"):
        run_language(3)


def test_frozen_leaves_stay_and_have_no_moments_or_average() -> None:
    model, optimizer = build(VAE), make_optimizer(Optimizer(learning_rate=0.1, weight_decay=0.1), 5)
    batch = batch_of(VAE, 4, 0)
    init = partial(init_train_state, model, optimizer, frozen=("^encoder/",), ema_decay=0.5)
    before = jax.jit(init)(jax.random.key(0), batch)
    after, _ = jax.jit(make_train_step(model, optimizer, ema_decay=0.5))(before, batch, jax.random.key(1))
    assert set(before.frozen) == {"encoder"} and "encoder" not in before.params
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    assert np.any(after.params["decoder"]["latent"]["kernel"] != before.params["decoder"]["latent"]["kernel"])
    kept = [path for path in leaves_by_path((after.opt_state, after.ema)) if "encoder" in path]
    assert kept == []
    averaged = eval_variables(after)["params"]
    jax.tree.map(np.testing.assert_array_equal, averaged["encoder"], before.frozen["encoder"])
    jax.tree.map(np.testing.assert_array_equal, averaged["decoder"], after.ema["decoder"])


def test_frozen_parameters_of_half_the_bits_take_part_and_no_gradient_is_of_them() -> None:
    """Of two layers, one rounded to bfloat16: the step is that of the other around the rounded one."""

    def loss(variables: dict, batch: dict, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        params = variables["params"]
        return jnp.mean(jnp.square(batch["x"] @ params["below"] @ params["above"])), Aux({}, jnp.float32(4))

    kernels = {name: jax.random.normal(jax.random.key(i), (3, 3)) for i, name in enumerate(("below", "above"))}
    model = Model(inputs={}, init=lambda key, batch: {"params": kernels}, loss=loss, rules=())
    batch, optimizer = {"x": jax.random.normal(jax.random.key(2), (4, 3))}, optax.sgd(1.0)
    state = init_train_state(model, optimizer, jax.random.key(0), batch, frozen=["below"], frozen_dtype="bfloat16")
    assert state.frozen["below"].dtype == jnp.bfloat16 and state.params["above"].dtype == jnp.float32
    after, _ = jax.jit(make_train_step(model, optimizer))(state, batch, jax.random.key(0))
    rounded = np.asarray(kernels["below"].astype(jnp.bfloat16), np.float64)
    hidden = np.asarray(batch["x"], np.float64) @ rounded
    gradient = 2 * hidden.T @ hidden @ np.asarray(kernels["above"], np.float64) / 12
    np.testing.assert_allclose(after.params["above"], kernels["above"] - gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after.frozen["below"], state.frozen["below"])


def test_what_is_given_is_not_drawn_and_the_rest_is_as_ever() -> None:
    model, optimizer = build(VAE), optax.sgd(1.0)
    init = jax.jit(partial(init_train_state, model, optimizer, ema_decay=0.5))
    drawn = init(jax.random.key(0), batch_of(VAE, 4, 0))
    paths = leaves_by_path(drawn.params)
    path = next(path for path in paths if path.startswith("decoder/"))
    state = init(jax.random.key(0), batch_of(VAE, 4, 0), {f"params/{path}": jnp.full_like(paths[path], 7)})
    for name, leaf in leaves_by_path(state.params).items():
        np.testing.assert_array_equal(leaf, 7 if name == path else paths[name], err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


def test_a_pattern_of_frozen_parameters_that_none_matches_is_refused() -> None:
    with pytest.raises(UserError, match=r"frozen names \^encodr/, which no parameter's path matches: .* table$"):
        init_train_state(
            language_model(), optax.sgd(1.0), jax.random.key(0), language_batch(), frozen=("table", "^encodr/")
        )


def test_average_follows_its_recursion() -> None:
    """min(decay, (1 + t) / (10 + t)), t counted from 0."""
    model, optimizer = language_model(), optax.sgd(0.5)
    state = init_train_state(model, optimizer, jax.random.key(0), language_batch(), ema_decay=0.15)
    step = jax.jit(make_train_step(model, optimizer, ema_decay=0.15))
    expected = np.asarray(state.params["table"])
    for decay in (0.1, 0.15, 0.15):
        state, _ = step(state, language_batch(), jax.random.key(1))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["table"])
        np.testing.assert_allclose(state.ema["table"], expected, rtol=1e-5)


def test_randomness_depends_on_the_step_alone() -> None:
    """The same state and batch draw other noise at another step, and the same at the same step."""
    model, optimizer = build(VAE), optax.sgd(0.0)
    batch = batch_of(VAE, 4, 0)
    state = jax.jit(lambda key: init_train_state(model, optimizer, key, batch))(jax.random.key(0))
    step = jax.jit(make_train_step(model, optimizer))
    losses = [float(step(state._replace(step=jnp.int32(i)), batch, jax.random.key(1))[1]["loss"]) for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_gradients_are_clipped_by_their_global_norm_and_reported_before() -> None:
    model = language_model()
    optimizer = optax.chain(clip_by_global_norm(1e-3), optax.sgd(1.0))
    state = init_train_state(model, optimizer, jax.random.key(0), language_batch())
    after, metrics = make_train_step(model, optimizer)(state, language_batch(), jax.random.key(1))
    moved = np.linalg.norm(after.params["table"] - state.params["table"])
    assert metrics["grad_norm"] > 0.01
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-3)
