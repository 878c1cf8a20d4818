"""LoRA: what adapters change, which kernels have them, how they lie on a mesh, and what they become merged."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import smallest
import vlm_jax
from experiments.run import run
from vlm_jax.contract import Model
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, from_record
from vlm_jax.lora import BASE, LoRA, adapted, merged
from vlm_jax.models import build
from vlm_jax.sharding import MeshShape, make_mesh, to_global
from vlm_jax.start import Start
from vlm_jax.train.layout import programs
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.train.step import TrainState
from vlm_jax.trees import leaves_by_path, map_with_path, unstack
from vlm_jax.workdir import read_record

KEY = jax.random.key(0)
CONFIG = LoRA(rank=2, alpha=6.0)


def scanned(config: Any) -> Any:
    """The same with a scan over two layers, without dropout, whose masks a scan draws otherwise."""
    if hasattr(config, "decoder"):
        return replace(config, decoder=replace(config.decoder, depth=2, scan=True, dropout=0.0))
    if hasattr(config, "transformer"):
        return replace(config, transformer=replace(config.transformer, depth=2, scan=True, dropout=0.0))
    return replace(config, image=scanned(config.image), text=scanned(config.text))


def unscanned(config: Any) -> Any:
    if hasattr(config, "transformer"):
        return replace(config, transformer=replace(config.transformer, scan=False))
    return replace(config, image=unscanned(config.image), text=unscanned(config.text))


CONFIGS = {
    "clip": scanned(smallest.CLIP),
    "language": scanned(smallest.CONFIGS["language"]),
    "clip, unrolled": unscanned(scanned(smallest.CLIP)),
}


def batch_of(model: Model, size: int = 8) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    batch = {}
    for name, spec in model.inputs.items():
        values = random.integers(0, spec.limit or 2, (size, *spec.shape))
        if name in ("segment", "target"):
            values[:] = 1  # one document a row, all of which is to be predicted
        if spec.contains is not None:
            values[:, -1] = spec.contains
        batch[name] = jnp.asarray(values, spec.dtype)
    return batch


def outputs(model: Model, variables: Any, batch: Any) -> dict[str, Any]:
    """The loss, its metrics, and every capability that reads a batch."""

    def every(variables: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"loss": model.loss(variables, batch, KEY, jnp.int32(0), train=False)}
        if model.embed_image is not None:
            found["image"] = model.embed_image(variables, batch["image"])
            found["text"] = model.embed_text(variables, batch["tokens"])
        if model.log_likelihood is not None:
            found["nats"] = model.log_likelihood(variables, batch, KEY)
        return found

    return jax.jit(every)(variables)


@pytest.fixture(scope="module", params=["clip", pytest.param("language", marks=pytest.mark.slow)])
def base(request: Any) -> Model:
    return build(CONFIGS[request.param])


@pytest.fixture(scope="module")
def variables(base: Model) -> Any:
    return jax.jit(adapted(base, CONFIG).init)(KEY, batch_of(base))


def trained(variables: Any) -> Any:
    """As if the adapters had trained: B is no longer zero."""
    random = np.random.default_rng(1)
    return map_with_path(
        lambda path, leaf: jnp.float32(random.normal(scale=5, size=leaf.shape)) if path.endswith("/b") else leaf,
        variables,
    )


def test_at_the_start_an_adapted_model_is_its_base_to_the_last_bit(base: Model, variables: Any) -> None:
    batch = batch_of(base)
    drawn = jax.jit(base.init)(KEY, batch)
    plain = {**variables, "params": {name: leaf for name, leaf in variables["params"].items() if name != "lora"}}
    jax.tree.map(np.testing.assert_array_equal, plain, drawn)
    expected, actual = outputs(base, drawn, batch), outputs(adapted(base, CONFIG), variables, batch)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_merged_weights_are_the_kernels_with_the_product_of_each_layer_added(base: Model, variables: Any) -> None:
    variables = trained(variables)
    before, after = leaves_by_path(variables["params"]), leaves_by_path(merged(variables, CONFIG)["params"])
    assert after.keys() == {path for path in before if not path.startswith("lora/")}
    for path, kernel in after.items():
        expected = np.asarray(before[path], np.float64)
        if re.search(CONFIG.pattern, path):
            a, b = (np.asarray(before[f"lora/{path}/{name}"], np.float64) for name in "ab")
            *layers, _, _ = kernel.shape
            for layer in np.ndindex(*layers):
                expected[layer] += 3.0 * a[layer] @ b[layer]  # alpha / rank
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-5, err_msg=path)


def test_the_plain_model_computes_the_same_of_merged_weights(base: Model, variables: Any) -> None:
    batch, variables = batch_of(base), trained(variables)
    actual = outputs(base, jax.jit(lambda variables: merged(variables, CONFIG))(variables), batch)
    expected = outputs(adapted(base, CONFIG), variables, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)
    start = outputs(base, jax.jit(base.init)(KEY, batch), batch)
    assert abs(start["loss"][0] - expected["loss"][0]) > 1e-4  # the adapters do count, beyond what is let pass


def test_what_draws_sees_merged_weights_too() -> None:
    """As every capability does: here one that shows what it is given."""

    def shown(variables: Any, key: Any, given: Any, *, num: int, temperature: Any) -> jax.Array:
        assert variables["params"].keys() == {"query"}
        return jnp.broadcast_to(variables["params"]["query"]["kernel"], (num, 3, 3))

    params = {"query": {"kernel": jnp.eye(3)}}
    rules = (("kernel$", (None, None)),)
    model = Model(inputs={}, init=lambda *_: {"params": params}, loss=lambda *_: None, rules=rules, sample=shown)
    config = LoRA(rank=1, alpha=1.0, pattern="kernel$")
    adapters = {"query": {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 3))}}}
    drawn = adapted(model, config).sample({"params": {**params, "lora": adapters}}, KEY, {}, num=1)
    np.testing.assert_array_equal(drawn[0], np.eye(3) + 1)


def test_attention_and_feed_forward_layers_have_adapters_and_nothing_else(base: Model, variables: Any) -> None:
    adapters = leaves_by_path(variables["params"]["lora"])
    kernels = {path.rpartition("/")[0] for path in adapters}
    assert kernels == {path for path in leaves_by_path(variables["params"]) if re.search(CONFIG.pattern, path)} - {""}
    names = {path.split("/")[-2] for path in kernels}
    assert names - {"gate"} == {"query", "key", "value", "out", "up", "down"} and ("gate" in names) == (
        base.generate is not None
    )
    assert not any("head" in path.replace("heads", "") or "projection" in path for path in kernels)
    for path in kernels:
        *layers, inputs, outputs = leaves_by_path(variables["params"])[path].shape
        assert adapters[f"{path}/a"].shape == (*layers, inputs, 2)
        assert adapters[f"{path}/b"].shape == (*layers, 2, outputs)
        assert not adapters[f"{path}/b"].any()


def test_a_scanned_stack_has_an_adapter_a_layer() -> None:
    """Those of the unrolled stack, stacked: both compute the same."""
    stacked, plain = (adapted(build(CONFIGS[name]), CONFIG) for name in ("clip", "clip, unrolled"))
    batch = batch_of(stacked)
    variables = trained(jax.jit(stacked.init)(KEY, batch))

    def unrolled(tree: Any) -> Any:
        inner = {name: unrolled(branch) if isinstance(branch, dict) else branch for name, branch in tree.items()}
        return unstack(inner, "blocks", "block")

    actual = outputs(plain, {"params": unrolled(variables["params"])}, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, outputs(stacked, variables, batch)
    )
    first, second = leaves_by_path(variables["params"]["lora"])["image/transformer/blocks/attention/query/kernel/a"]
    assert np.abs(first - second).min() > 0


def test_a_is_normal_of_the_variance_that_keeps_its_input_s() -> None:
    tower = replace(smallest.TRANSFORMER, width=256, heads=1, depth=1)
    config = replace(smallest.CONFIGS["autoregressive"], transformer=tower)
    model = adapted(build(config), LoRA(rank=64))
    drawn = leaves_by_path(jax.jit(model.init)(KEY, batch_of(model))["params"]["lora"])
    a = np.asarray(drawn["transformer/block_0/attention/query/kernel/a"])
    assert a.shape == (256, 64)
    assert abs(a.mean()) < 5 / 16 / np.sqrt(a.size)
    assert abs(a.var() * 256 - 1) < 5 * np.sqrt(2 / a.size)
    assert np.any(a != drawn["transformer/block_0/attention/key/kernel/a"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "lora.rank is 0: it must be at least 1, or None"),
        ({"alpha": 0.0}, "lora.alpha is 0.0: it must be above 0"),
        ({"pattern": "("}, r"lora.pattern '\(' is no regular expression"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(**fields)


def test_a_pattern_that_finds_no_kernel_is_refused() -> None:
    model = build(CONFIGS["clip"])
    with pytest.raises(UserError, match=r"'querry' is found in the path of no parameter: there are .*query/kernel"):
        adapted(model, LoRA(rank=2, pattern="querry"))
    with pytest.raises(UserError, match=r"finds .*bias of shape \[.*\], which is no kernel: narrow it"):
        adapted(model, LoRA(rank=2, pattern="final_norm/bias"))


def trajectory(mesh: MeshShape, devices: int) -> TrainState:
    """Three steps of the adapters alone, their base frozen, from one initialisation."""
    model = adapted(build(CONFIGS["clip"]), CONFIG)
    optimizer = Optimizer(learning_rate=0.1, schedule="constant", eps=1e-3)
    training = Training(optimizer=optimizer, steps=3, batch_size=8)
    on = make_mesh(mesh, jax.devices()[:devices])
    with jax.set_mesh(on):
        _, init, step = programs(model, training, on, frozen=(BASE,))
        state = init(KEY, to_global(batch_of(model), 8, on), {})
        for _ in range(3):
            state, _ = step(state, to_global(batch_of(model), 8, on), jax.random.key(1))
    return state


@pytest.fixture(scope="module")
def sharded() -> TrainState:
    return trajectory(MeshShape(data=2, fsdp=2, tensor=2), 8)


def test_only_adapters_move_and_have_moments(sharded: TrainState) -> None:
    model = adapted(build(CONFIGS["clip"]), CONFIG)
    drawn = leaves_by_path(jax.jit(model.init)(KEY, batch_of(model))["params"])
    for path, leaf in leaves_by_path(sharded.frozen).items():
        np.testing.assert_array_equal(leaf, drawn[path], err_msg=path)
    live = leaves_by_path(sharded.params)
    assert live.keys() | leaves_by_path(sharded.frozen).keys() == drawn.keys()
    assert all(path.startswith("lora/") and np.any(leaf != drawn[path]) for path, leaf in live.items())
    moments = [path for path in leaves_by_path(sharded.opt_state) if "kernel" in path]
    assert len(moments) == 2 * len(live) and all("/lora/" in path for path in moments)


def test_adapters_lie_as_the_dimension_of_the_kernel_that_they_keep(sharded: TrainState) -> None:
    layouts = {path: leaf.sharding.spec for path, leaf in leaves_by_path((sharded.params, sharded.frozen)).items()}
    block = "image/transformer/blocks"
    assert layouts[f"1/{block}/attention/query/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert layouts[f"0/lora/{block}/attention/query/kernel/a"] == PartitionSpec(None, "fsdp", None)
    assert layouts[f"0/lora/{block}/attention/query/kernel/b"] == PartitionSpec(None, None, "tensor")
    assert layouts[f"0/lora/{block}/mlp/down/kernel/a"] == PartitionSpec(None, "tensor", None)
    assert layouts[f"0/lora/{block}/mlp/down/kernel/b"] == PartitionSpec(None, None, "fsdp")


@pytest.mark.slow
def test_one_trajectory_on_one_and_eight_devices(sharded: TrainState) -> None:
    expected = leaves_by_path(trajectory(MeshShape(), 1).params)
    for path, leaf in leaves_by_path(sharded.params).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-4, err_msg=path)


@pytest.fixture(scope="module")
def tuned(clip_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """A run of adapters on another run's model, saved twice."""
    workdir, old = tmp_path_factory.mktemp("lora") / "run", from_record(read_record(clip_run))
    training = replace(old.training, steps=2, checkpoint_every=1, ema_decay=0.5)
    data = replace(old.data, name="openmoji", validation=None)
    begun = replace(old, training=training, data=data, workdir=str(workdir), start=(Start(workdir=str(clip_run)),))
    experiment = replace(begun, lora=CONFIG)
    run("clip-tiny", experiment)
    return experiment, workdir


@pytest.mark.slow
def test_a_run_of_adapters_saves_them_alone_and_loads_as_a_plain_model(tuned: tuple, clip_run: Path) -> None:
    experiment, workdir = tuned
    assert experiment.frozen == (BASE,)
    assert {path.name for path in (workdir / "checkpoints" / "2").iterdir()} >= {"params", "ema"}
    loaded, base = vlm_jax.load(workdir), vlm_jax.load(clip_run)
    found, before = leaves_by_path(loaded.variables), leaves_by_path(base.variables)
    assert found.keys() == before.keys()
    for path, leaf in found.items():
        assert np.any(leaf != before[path]) == bool(re.search(CONFIG.pattern, path)), path
        moved = np.asarray(leaf - before[path]).reshape(-1, *leaf.shape[-2:])
        assert all(np.linalg.matrix_rank(layer, tol=1e-5) <= 2 for layer in moved)
    image = np.zeros((1, *loaded.model.inputs["image"].shape), np.uint8)
    assert (
        loaded.model.embed_image(loaded.variables, image).shape == base.model.embed_image(base.variables, image).shape
    )


@pytest.mark.slow
def test_a_run_of_adapters_goes_on_and_needs_a_base(tuned: tuple, tmp_path: Path) -> None:
    experiment, workdir = tuned
    run("clip-tiny", replace(experiment, training=replace(experiment.training, steps=3)))
    assert vlm_jax.load(workdir).step == 3
    with pytest.raises(UserError, match="which are frozen and would stay random"):
        run("clip-tiny", replace(experiment, start=(), workdir=str(tmp_path / "run")))
    other = replace(experiment, lora=replace(CONFIG, rank=3))
    with pytest.raises(UserError, match=r"belongs to another configuration \(lora.rank: 2 -> 3\)"):
        run("clip-tiny", other)
