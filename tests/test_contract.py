"""What every family owes: held for each tiny preset there is, so that a new family is covered by having one.

What has to be compiled is held for the smallest configurations (`smallest.py`), and for the presets as a slow test. Of
what is a part of other models, and trains as such alone, there are smallest configurations and no presets.
"""

import math
import re
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.presets import presets
from smallest import CONFIGS as SMALLEST
from smallest import PARTS
from vlm_jax.contract import CAPABILITIES, SEQUENCE, Input, Model, abstract_batch, check_batch
from vlm_jax.errors import UserError
from vlm_jax.models import FAMILIES, build, family_of
from vlm_jax.sharding import MeshShape, make_mesh, parameter_shardings
from vlm_jax.train.optim import make_optimizer
from vlm_jax.train.step import init_train_state, train_state_shardings
from vlm_jax.trees import leaves_by_path

PRESETS = {name: experiment.model for name, (_, experiment) in presets().items()}
TINY = [*{model: name for name, model in reversed(PRESETS.items()) if "tiny" in name}.values()][::-1]
"""The first of each model, of which some presets are other data for the same."""
UNTRAINED = [name for name, config in SMALLEST.items() if family_of(config) in PARTS]
CONFIGS = PRESETS | {name: SMALLEST[name] for name in UNTRAINED}
COMPILED = SMALLEST | {name: PRESETS[name] for name in TINY}
SAMPLING = {name: experiment.sampling for name, (_, experiment) in presets().items()}
FIRST = {family_of(config): name for name, config in reversed(SMALLEST.items())}
QUICK = [name for family, name in FIRST.items() if family != "inception"]
"""The first of each family: its variants, what has a reader's programs to compile beside its own, and `inception`,
which has 94 convolutions however narrow it is, are held with the presets."""
VARIANTS = [*TINY, *(name for name in SMALLEST if name not in QUICK)]
SLOW, SLOW_TRAINED = (
    [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in without]
    for without in ((), UNTRAINED)
)
TRAINED = [*(name for name in QUICK if name not in UNTRAINED), *SLOW_TRAINED]
BATCH = 4
KEY = jax.random.key(0)

CLOSED_FORM = ("gaussian_process", "kde")
"""Families that start from the moments of their first batch, where networks draw from the key."""

NO_GRADIENT = r"(attention(_0)?/key/bias|untold/features)$"
"""A key's bias adds the same to all logits of a query, and the softmax does not see it: its gradient is rounding. What
stands for a text that is not told is read where one is dropped, which of four examples none need be."""


def random_batch(model: Model, size: int = BATCH) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    batch = {}
    for name, spec in model.inputs.items():
        shape = (size, *spec.shape)
        values = random.normal(size=shape) if spec.limit is None else random.integers(0, spec.limit, shape)
        if name == "segment":
            values = 1 + np.sort(values % 2)  # documents of several tokens, for there to be something to attend to
            values[:, -1] = 0
        if spec.span is not None:
            values[:] = spec.span * np.arange(*spec.shape)  # one after the other
        batch[name] = values.astype(spec.dtype)
        if spec.contains is not None:
            batch[name][..., -1] = spec.contains
    return check_batch(model.inputs, batch)


@cache
def abstract_variables(preset: str) -> Any:
    model = build((PRESETS | SMALLEST)[preset])
    return jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, BATCH))


@pytest.fixture(scope="module", params=[*QUICK, *SLOW])
def config(request) -> Any:
    return COMPILED[request.param]


@pytest.fixture(scope="module")
def model(config: Any) -> Model:
    return build(config)


@pytest.fixture(scope="module")
def init(model: Model) -> Any:
    batch, compiled = random_batch(model), jax.jit(model.init)
    return lambda key: compiled(key, batch)


@pytest.fixture(scope="module")
def variables(init) -> Any:
    """As initialised, each parameter moved at random, so that none that starts at zero hides another."""
    random, variables = np.random.default_rng(0), init(KEY)
    moved = jax.tree.map(lambda x: x + 0.02 * random.normal(size=x.shape).astype(x.dtype), variables["params"])
    return {**variables, "params": moved}


def test_every_family_has_a_tiny_preset_and_a_smallest_configuration():
    assert {family_of(PRESETS[name]) for name in TINY} == set(FAMILIES) - set(PARTS)
    assert {family_of(config) for config in SMALLEST.values()} == set(FAMILIES)


def test_initialisation_is_a_function_of_the_key(config: Any, model: Model, init):
    """Built and traced twice, so that nothing may be drawn when either happens."""
    first, second = init(KEY), jax.jit(build(config).init)(KEY, random_batch(model))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other = init(jax.random.key(1))
    differ = any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
    assert differ == (family_of(config) not in CLOSED_FORM)
    assert {leaf.dtype for leaf in jax.tree.leaves(first["params"])} == {np.dtype(np.float32)}


@pytest.mark.parametrize("config", UNTRAINED, indirect=True)
def test_a_part_of_other_models_says_that_it_has_no_loss(model: Model):
    with pytest.raises(UserError, match=r"has no loss: make it a part of another model"):
        model.loss({}, random_batch(model), KEY, 0, train=True)


@pytest.mark.parametrize("config", TRAINED, indirect=True)
def test_the_loss_is_a_finite_float32_scalar_and_a_function_of_its_arguments(model: Model, variables):
    before, batch = jax.tree.map(np.array, variables), random_batch(model)
    loss = jax.jit(lambda variables, key: model.loss(variables, batch, key, jnp.zeros((), jnp.int32), train=True))
    value, aux = loss(variables, KEY)
    assert value.shape == () and value.dtype == jnp.float32 and jnp.isfinite(value)
    for metric in aux.metrics.values():
        assert metric.shape == () and jnp.isfinite(metric)
    assert loss(variables, KEY)[0] == value
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.structure(aux.state) == jax.tree.structure({k: v for k, v in variables.items() if k != "params"})


@pytest.mark.parametrize("config", TRAINED, indirect=True)
def test_the_weight_counts_examples_or_tokens(model: Model, variables):
    """It doubles where every example is there twice; None: the loss is no mean over items."""

    def weight(copies: int) -> Any:
        batch = {
            name: np.tile(values, (copies, *[1] * (values.ndim - 1))) for name, values in random_batch(model).items()
        }
        return jax.jit(lambda variables: model.loss(variables, batch, KEY, 0, train=False)[1].weight)(variables)

    one, two = weight(1), weight(2)
    if one is None:
        assert two is None
    else:
        assert one.shape == () and one.dtype == jnp.float32
        assert one >= (1 if "target" in model.inputs else BATCH) and two == 2 * one


@pytest.mark.slow
@pytest.mark.parametrize("config", TINY, indirect=True)
def test_gradients_reach_every_parameter(config: Any, model: Model, variables):
    """But for the layers of a tower beyond those that features are read at, for a whole tower has them, and for a first
    stage, which is held."""
    rest = {collection: tree for collection, tree in variables.items() if collection != "params"}

    def loss(params: Any) -> jax.Array:
        late = jnp.full((), 10_000)  # when all parts of a loss that come in one after the other are there
        return model.loss({"params": params, **rest}, random_batch(model), KEY, late, train=True)[0]

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    sizes = {path: float(jnp.abs(leaf).max()) for path, leaf in leaves_by_path(gradients).items()}
    assert all(np.isfinite(size) for size in sizes.values())
    largest = max(sizes.values())
    unreached = {path for path, size in sizes.items() if size < 1e-7 * largest}
    last = config.vision.transformer.depth - 1 if family_of(config) == "llava" else None
    beyond = {path for path in sizes if re.match(rf"vision/transformer/(block_{last}|final_norm)/", path)}
    assert beyond <= unreached and (last is None or beyond)
    beyond |= {path for path in sizes if re.match(r"(image/)?first/", path)}
    assert beyond <= unreached
    assert not [path for path in unreached - beyond if not re.search(NO_GRADIENT, path)]


@pytest.mark.parametrize("preset", [*QUICK, *SLOW])
def test_capabilities_return_what_the_contract_says(preset: str):
    config = COMPILED[preset]
    model = build(config)
    variables = abstract_variables(preset)
    batch = {name: jnp.asarray(values) for name, values in random_batch(model).items()}
    declared = [capability for capability in CAPABILITIES if getattr(model, capability) is not None]
    for capability in declared:
        function = getattr(model, capability)
        if capability in ("embed_image", "embed_text"):
            field = "image" if capability == "embed_image" else "tokens"
            y = jax.eval_shape(function, variables, batch[field])
            assert (y.ndim, len(y), y.dtype) == (2, BATCH, jnp.float32)
        elif capability == "image_features":
            y = jax.eval_shape(function, variables, batch["image"])
            assert (y.ndim, len(y), y.dtype) == (3, BATCH, jnp.float32)
        elif capability == "text_features":
            y, mask = jax.eval_shape(function, variables, batch["tokens"])
            assert (y.shape[:2], y.ndim, y.dtype) == (batch["tokens"].shape, 3, jnp.float32)
            assert (mask.shape, mask.dtype) == (batch["tokens"].shape, jnp.bool_)
        elif capability in ("log_likelihood", "log_weight"):
            y = jax.eval_shape(function, variables, batch, KEY)
            assert (y.shape, y.dtype) == ((BATCH,), jnp.float32)
        elif capability == "encode":
            specs = model.latents if isinstance(model.latents, dict) else {"latents": model.latents}
            for key in (None, KEY):
                y = jax.eval_shape(function, variables, batch["image"], key)
                parts = y if isinstance(y, dict) else {"latents": y}
                expected = {name: ((BATCH, *spec.shape), spec.dtype) for name, spec in specs.items()}
                assert {name: (part.shape, part.dtype) for name, part in parts.items()} == expected
        elif capability == "posterior":
            for part in jax.eval_shape(function, variables, batch["image"]):
                assert (part.shape, part.dtype) == ((BATCH, *model.latents.shape), jnp.float32)
        elif capability == "log_likelihood_given":
            latents = jax.eval_shape(model.encode, variables, batch["image"])
            y = jax.eval_shape(function, variables, batch["image"], latents)
            assert (y.shape, y.dtype) == ((BATCH,), jnp.float32)
        elif capability == "stage":
            stage = jax.eval_shape(function, variables, batch["image"])
            cached = {name: values for name, values in batch.items() if name != "image"} | {"stage": stage}
            loss = partial(model.loss, key=KEY, step=0, train=True)
            assert jax.eval_shape(loss, variables, cached)[0].shape == ()
        elif capability == "decode":
            y = jax.eval_shape(function, variables, jax.eval_shape(model.encode, variables, batch["image"]))
            assert (y.shape, y.dtype) == (batch["image"].shape, batch["image"].dtype)
        elif capability == "sample":
            for temperature in (1.0, 0.0):
                draw = partial(function, num=3, temperature=temperature)
                y = jax.eval_shape(draw, variables, KEY, {})
                assert (y.shape, y.dtype) == ((3, *batch["image"].shape[-3:]), jnp.uint8)  # one of a row
            for sampling in {model.sampling, SAMPLING.get(preset)} - {None}:
                options = {"on_step": lambda done, state: None} if hasattr(sampling, "steps") else {}
                jax.eval_shape(partial(function, num=3, sampling=sampling, **options), variables, KEY, {})
        elif capability == "complete":
            image = batch["image"]
            rows = image.shape[1] // 2
            rows -= rows % getattr(config, "patch_size", 1)  # whole patches, of which the smallest has one
            known = np.arange(image.shape[1])[:, None].repeat(image.shape[2], axis=1) < rows
            y = jax.eval_shape(partial(function, known=known), variables, KEY, image)
            assert (y.shape, y.dtype) == (image.shape, image.dtype)
        elif capability == "generate":
            beginning = {name: values[:, :3] if name in SEQUENCE else values for name, values in batch.items()}
            two = type(model.sampling)(length=2)
            y = jax.eval_shape(partial(function, sampling=two), variables, KEY, beginning)
            expected = {name: ((BATCH, 5), batch[name].dtype) for name in SEQUENCE}
            assert {name: (field.shape, field.dtype) for name, field in y.items() if name in SEQUENCE} == expected
        else:
            raise AssertionError(f"nothing here says what {capability} returns")
    assert declared


def test_a_likelihood_says_of_how_many_sub_pixels_or_tokens_it_is(model: Model):
    assert (model.count is None) == (model.log_likelihood is None)
    if model.count is not None and "tokens" not in model.inputs:
        size = math.prod(model.inputs["image"].shape)
        np.testing.assert_array_equal(model.count(random_batch(model)), np.full(BATCH, size), strict=False)


def test_settings_of_sampling_are_a_frozen_dataclass_that_belongs_to_no_config(config: Any, model: Model):
    assert model.sampling is None or (is_dataclass(model.sampling) and hash(model.sampling) is not None)
    named = {field.name for field in fields(model.sampling)} if model.sampling is not None else set()
    assert named & ({field.name for field in fields(config)} | {"temperature", "num"}) == set()


def test_encoding_has_the_latents_that_decoding_reads(model: Model):
    assert (model.encode is None) == (model.decode is None) == (model.latents is None)


def test_a_likelihood_says_whether_it_is_a_bound(model: Model):
    assert (model.bound is None) == (model.log_likelihood is None)
    assert model.log_weight is None or model.bound == "lower"
    assert model.dequantisation is None or model.bound in ("lower", "estimate")


def test_every_tokens_and_image_field_states_its_limit(model: Model):
    assert all(spec.limit is not None for spec in model.inputs.values() if np.issubdtype(spec.dtype, np.integer))


def mesh_for(preset: str, shape: MeshShape) -> Mesh:
    """SmolLM2-135M has nine heads, which are not split in halves."""
    nine = MeshShape(data=shape.data, fsdp=shape.fsdp * shape.tensor)
    return make_mesh(nine if "smollm2" in preset else shape)


@pytest.mark.parametrize("shape", [MeshShape(data=2, fsdp=2, tensor=2), MeshShape(data=1, fsdp=8)], ids=["2x2x2", "8"])
@pytest.mark.parametrize("preset", CONFIGS)
def test_rules_lay_out_every_parameter_and_none_is_left_over(preset: str, shape: MeshShape):
    model, mesh = build(CONFIGS[preset]), mesh_for(preset, shape)
    params = abstract_variables(preset)["params"]
    shardings = parameter_shardings(params, model.rules, mesh)
    leaves, layouts = leaves_by_path(params), leaves_by_path(shardings)
    assert leaves.keys() == layouts.keys()
    # What the rules are for: nearly all of the parameters are split, by the axis that splits the fewest at least. A
    # scalar cannot be, and a kernel density estimator's bandwidth is all that it has.
    arrays = {path: leaf for path, leaf in leaves.items() if leaf.ndim}
    held = sum(np.prod(layouts[path].shard_shape(leaf.shape)) for path, leaf in arrays.items())
    assert held < 0.6 * sum(leaf.size for leaf in arrays.values()) or family_of(CONFIGS[preset]) == "kde"


@pytest.mark.parametrize("preset", PRESETS)
def test_moments_and_averages_lie_beside_their_parameters(preset: str):
    training = presets()[preset][1].training
    model, mesh = build(CONFIGS[preset]), mesh_for(preset, MeshShape(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(training.optimizer, training.steps)
    abstract = jax.eval_shape(
        lambda key, batch: init_train_state(model, optimizer, key, batch, ema_decay=0.9),
        KEY,
        abstract_batch(model.inputs, BATCH),
    )
    shardings = train_state_shardings(model, optimizer, abstract, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    params = leaves_by_path(parameter_shardings(abstract.params, model.rules, mesh))
    assert leaves_by_path(shardings.params) == params
    assert leaves_by_path(shardings.ema) == params
    # Of each leaf of Adam's two moments, the path ends as that of the parameter; a count is everywhere.
    expected = {f"{moment}/{path}": layout for path, layout in params.items() for moment in ("mu", "nu")}
    found = {
        re.sub(r"^.*?/(mu|nu)/", r"\1/", path): layout for path, layout in leaves_by_path(shardings.opt_state).items()
    }
    assert expected.items() <= found.items()
    rest = [layout for path, layout in found.items() if path not in expected]
    assert set(rest) == {NamedSharding(mesh, PartitionSpec())}


INPUTS = {
    "image": Input((2, 2, 1), "uint8", 17),
    "tokens": Input((3,), "int32", 10, contains=2),
    "x": Input((), "float32"),
    "image_at": Input((2,), "int32", 10, span=3),
}


def host_batch(**changes: Any) -> dict[str, np.ndarray]:
    batch = {
        "image": np.full((2, 2, 2, 1), 16, np.uint8),
        "tokens": np.array([[0, 2, 9], [2, 2, 1]], np.int32),
        "x": np.array([-np.inf, 1e9], np.float32),
        "image_at": np.array([[6, 3], [9, 9]], np.int32),
        "label": np.zeros(2),
    }
    return {name: value for name, value in (batch | changes).items() if value is not None}


def test_a_batch_that_fits_passes_without_the_fields_that_nobody_reads():
    batch = host_batch()
    checked = check_batch(INPUTS, batch)
    assert list(checked) == list(INPUTS)
    assert all(checked[name] is batch[name] for name in checked)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        (
            "tokens",
            None,
            "the model reads the field 'tokens' and the data have ['image', 'image_at', 'label', 'x']: choose",
        ),
        ("image", np.zeros((2, 2, 3, 1), np.uint8), "uint8[2, 3, 1] an example and the model expects uint8[2, 2, 1]"),
        ("image", np.zeros((2, 2, 2, 1), np.int32), "int32[2, 2, 1] an example and the model expects uint8[2, 2, 1]"),
        ("image", np.full((2, 2, 2, 1), 17, np.uint8), "the field 'image' holds the value 17, outside [0, 17)"),
        ("tokens", np.array([[0, 2, 10]], np.int32), "the field 'tokens' holds the value 10, outside [0, 10)"),
        ("tokens", np.array([[-1, 2, 9]], np.int32), "the field 'tokens' holds the value -1, outside [0, 10)"),
        ("tokens", np.array([[0, 2, 1], [0, 1, 3]], np.int32), "an example's field 'tokens' lacks the value 2"),
        ("image_at", np.array([[0, 3], [3, 5]], np.int32), "'image_at' holds [3, 5], where each image takes 3 places"),
        ("image_at", np.array([[9, 7]], np.int32), "must not overlap, nor end beyond the 9 that there are"),
    ],
    ids=["missing", "shape", "dtype", "level", "high", "negative", "lacking", "overlapping", "cut off"],
)
def test_a_batch_that_does_not_fit_is_refused(field: str, values: np.ndarray | None, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        check_batch(INPUTS, host_batch(**{field: values}))


def test_an_abstract_batch_has_the_shapes_and_dtypes_of_a_checked_one():
    abstract = abstract_batch(INPUTS, 2)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in abstract.items()} == {
        name: (values.shape, values.dtype) for name, values in check_batch(INPUTS, host_batch()).items()
    }
