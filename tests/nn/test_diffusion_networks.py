"""The U-Net and the diffusion transformer: sizes, what they see, where they start."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import attention, conv, dense, group_norm, layer_norm, mlp, random_params, silu
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Conditioning, Told, timestep_features
from vlm_jax.nn.convolution import SpatialAttention, check_halved
from vlm_jax.nn.denoiser import Denoiser, Guidance, Network
from vlm_jax.nn.dit import DiT, DiTTower, position_features
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import UNet, UNetBlock, UNetTower
from vlm_jax.nn.vision import patchify, unpatchify
from vlm_jax.trees import count_parameters, leaves_by_path

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = np.float32(RANDOM.normal(size=(3, 4, 4, 2)))
TIME = np.float32([0, 500, 999])
LABEL = np.int32([0, 1, 2])
NETWORKS = {
    "unet": Network(backbone=UNet(widths=(8, 16), blocks=1, attention=(2,), groups=4), classes=3),
    "dit": Network(backbone=DiT(patch_size=2, transformer=Transformer(width=16, depth=2, heads=2, mlp=32)), classes=3),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest):
    """The jitted network and its variables, none of them as initialised."""
    module = Denoiser(NETWORKS[request.param], 2)
    shapes = jax.eval_shape(module.init, KEY, X, TIME, Told(LABEL))
    variables = jax.tree.map(lambda leaf: np.float32(0.3 * RANDOM.normal(size=leaf.shape)), shapes)
    return jax.jit(module.apply, static_argnames=("train", "guidance", "guided")), variables


def test_the_output_depends_on_every_pixel_the_time_and_the_label(network):
    apply, variables = network
    y = apply(variables, X, TIME, Told(LABEL))
    assert y.shape == X.shape and y.dtype == jnp.float32
    changed = X.copy()
    changed[:, 0, 3, 1] += 1
    assert (np.abs(apply(variables, changed, TIME, Told(LABEL)) - y) > 1e-4).any(axis=3).all()
    assert (np.abs(apply(variables, X, TIME + 1, Told(LABEL)) - y).max(axis=(1, 2, 3)) > 1e-3).all()
    assert (np.abs(apply(variables, X, TIME, Told(LABEL[::-1])) - y).max(axis=(1, 2, 3)) > 1e-3).tolist() == [
        True,
        False,
        True,
    ]


def test_images_of_a_batch_are_apart_and_one_time_serves_all(network):
    apply, variables = network
    y = apply(variables, X, np.float32(500), Told(LABEL))
    np.testing.assert_allclose(y[1], apply(variables, X, TIME, Told(LABEL))[1], atol=1e-5)
    np.testing.assert_allclose(y[::-1], apply(variables, X[::-1], np.float32(500), Told(LABEL[::-1])), atol=1e-5)


def test_guidance_is_the_line_through_both_predictions(network):
    """At 1 the label's, at 0 the one without: of the channels that it changes."""
    apply, variables = network
    told, untold = apply(variables, X, TIME, Told(LABEL)), apply(variables, X, TIME)
    np.testing.assert_array_equal(untold, apply(variables, X, TIME, Told(np.full(3, 3))))
    guided = apply(variables, X, TIME, Told(LABEL), guidance=Guidance(2.5))
    np.testing.assert_allclose(guided, untold + 2.5 * (told - untold), atol=1e-4)
    np.testing.assert_allclose(apply(variables, X, TIME, Told(LABEL), guidance=Guidance(0.0)), untold, atol=1e-5)
    partly = apply(variables, X, TIME, Told(LABEL), guidance=Guidance(2.5), guided=1)
    np.testing.assert_allclose(partly[..., 0], guided[..., 0], atol=1e-6)
    np.testing.assert_allclose(partly[..., 1], told[..., 1], atol=1e-5)


def test_the_transformer_starts_at_zero_and_its_blocks_as_the_identity():
    module = Denoiser(NETWORKS["dit"], 2)
    y, variables = jax.jit(lambda: module.init_with_output(KEY, X, TIME, Told(LABEL)))()
    np.testing.assert_array_equal(y, 0)
    modulations = {path: leaf for path, leaf in leaves_by_path(variables).items() if "modulation" in path}
    assert len(modulations) == 4
    assert all((leaf == 0).all() for leaf in modulations.values())


def test_timestep_features_are_those_of_the_papers():
    """DDPM's frequencies end at 1/10000 (its released code), DiT's one before it."""
    time = np.float32([0, 1, 999])
    for endpoint, last in ((True, 1e-4), (False, 10_000 ** (-3 / 4))):
        features = timestep_features(jnp.asarray(time), 8, endpoint=endpoint)
        np.testing.assert_allclose(features[:, 0], np.sin(time), atol=1e-4)
        np.testing.assert_allclose(features[:, 3], np.sin(time * last), atol=1e-4)
        np.testing.assert_allclose(features[:, 4:] ** 2 + features[:, :4] ** 2, 1, atol=1e-5)


def test_position_features_tell_columns_then_rows():
    features = np.asarray(position_features(3, 8)).reshape(3, 3, 8)
    frequencies = np.array([1, 1e-2])
    for row, column in ((0, 0), (2, 1), (1, 2)):
        expected = [wave(place * frequencies) for place in (column, row) for wave in (np.sin, np.cos)]
        np.testing.assert_allclose(features[row, column], np.concatenate(expected), atol=1e-6)


TRANSFORMER = Transformer(width=8, depth=2, heads=2, mlp=12, norm_eps=0.3, scan=False)
TOWERS: dict[str, Any] = {
    "unet": UNetTower(UNet(widths=(8, 16), blocks=1, attention=(2,), heads=2, groups=4), 2, 3),
    "dit": DiTTower(DiT(patch_size=2, transformer=TRANSFORMER), 2, 3),
}
ALL_DROPPED = 1 - 1e-6


def condition_of(params: Any, features: int, *, endpoint: bool) -> np.ndarray:
    frequencies = 10_000.0 ** -np.linspace(0, 1, features // 2, endpoint=endpoint)
    angles = TIME[:, None].astype(np.float64) * frequencies
    x = dense(params["time_in"], np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    return dense(params["time_out"], silu(x)) + params["label"][LABEL]


def dit_formula(params: Any, *, dropped: bool) -> np.ndarray:
    """2212.09748, section 3.2: adaLN-Zero."""
    condition = silu(condition_of(params["conditioning"], 256, endpoint=False))
    x = dense(params["patch"], patchify(X, 2)) + position_features(2, 8)
    for block in (params["block_0"], params["block_1"]):
        modulation = np.split(dense(block["modulation"], condition)[:, None], 6, axis=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        y = layer_norm({}, x, 0.3) * (1 + scale) + shift
        x = x + gate * attention(block["attention"], y, y, 2) * (not dropped)
        y = layer_norm({}, x, 0.3) * (1 + mlp_scale) + mlp_shift
        x = x + mlp_gate * mlp(block["mlp"], y, "gelu_tanh") * (not dropped)
    shift, scale = np.split(dense(params["last_modulation"], condition)[:, None], 2, axis=-1)
    return unpatchify(dense(params["last"], layer_norm({}, x, 0.3) * (1 + scale) + shift), 2, 2)


def unet_formula(params: Any, *, dropped: bool) -> np.ndarray:
    """2006.11239, appendix B, at widths of 8 and 16 and one block at each."""
    condition = silu(condition_of(params["conditioning"], 8, endpoint=True))

    def block(name: str, x: np.ndarray) -> np.ndarray:
        p = params[name]
        y = conv(p["conv_in"], silu(group_norm(p["norm_in"], x, 4)))
        y = silu(group_norm(p["norm_out"], y + dense(p["condition"], condition)[:, None, None], 4))
        y = conv(p["conv_out"], 0 * y if dropped else y)
        return y + (dense(p["skip"], x) if "skip" in p else x)

    def attend(name: str, x: np.ndarray) -> np.ndarray:
        y = group_norm(params[name]["norm"], x, 4).reshape(3, 4, 16)
        return x + attention(params[name], y, y, 2).reshape(x.shape)

    first = conv(params["first"], X)
    fine = block("down_0_0", first)
    down = conv(params["down_1"]["conv"], fine, stride=2)
    coarse = attend("down_1_0_attention", block("down_1_0", down))
    x = block("middle_1", attend("middle_attention", block("middle_0", coarse)))
    for i, skip in enumerate((coarse, down)):
        x = attend(f"up_1_{i}_attention", block(f"up_1_{i}", np.concatenate([x, skip], axis=-1)))
    x = conv(params["up_1"]["conv"], x.repeat(2, axis=1).repeat(2, axis=2))
    for i, skip in enumerate((fine, first)):
        x = block(f"up_0_{i}", np.concatenate([x, skip], axis=-1))
    return conv(params["last"], silu(group_norm(params["norm_out"], x, 4)))


@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "with all branches dropped"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_network_is_that_of_its_paper(name: str, dropped: bool):
    tower = TOWERS[name]
    params = random_params(jax.eval_shape(tower.init, KEY, X, TIME, LABEL)["params"], scale=0.3)
    expected = {"unet": unet_formula, "dit": dit_formula}[name](params, dropped=dropped)
    if dropped:
        config = tower.config
        if name == "dit":
            config = replace(config, transformer=replace(TRANSFORMER, dropout=ALL_DROPPED))
        else:
            config = replace(config, dropout=ALL_DROPPED)
        tower = tower.clone(config=config)
    apply = jax.jit(
        lambda params: tower.apply({"params": params}, X, TIME, LABEL, train=dropped, rngs={"dropout": KEY})
    )
    y = apply(params)
    np.testing.assert_allclose(y, expected, atol=1e-3 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1


def test_blocks_and_attention_of_the_unet_start_as_almost_their_skips():
    """By kernels of a variance of 1e-10 over the mean of inputs and outputs, where DDPM's release has a scale of 0."""
    config, x = UNet(widths=(64,), groups=8), np.zeros((1, 1, 1, 64), np.float32)
    block = jax.jit(UNetBlock(config, 64).init, static_argnames="train")(KEY, x, x[:, 0, 0], train=False)["params"]
    np.testing.assert_allclose(block["conv_out"]["kernel"].var(), 1e-10 / (9 * 64), rtol=0.05)
    attention = jax.jit(SpatialAttention(config.heads, config.groups).init)(KEY, x)["params"]
    np.testing.assert_allclose(attention["out"]["kernel"].var(), 1e-10 / 64, rtol=0.1)


def test_what_tells_the_class_starts_with_the_deviation_of_a_fiftieth():
    module = Conditioning(8, 8, False, classes=2000)
    params = jax.jit(module.init)(KEY, np.zeros(1, np.float32))["params"]
    np.testing.assert_allclose(params["label"].std(), 0.02, rtol=0.05)


def count(tower: UNetTower | DiTTower, side: int, channels: int) -> int:
    x = jax.ShapeDtypeStruct((1, side, side, channels), "float32")
    time = jax.ShapeDtypeStruct((1,), "float32")
    return count_parameters(jax.eval_shape(tower.init, KEY, x, time)["params"])


def test_ddpms_network_for_cifar10_has_its_35_7_million_parameters():
    """2006.11239, appendix B; exactly those of the released google/ddpm-cifar10-32."""
    unet = UNet(widths=(128, 256, 256, 256), blocks=2, attention=(16,))
    assert count(UNetTower(unet, 3), 32, 3) == 35_746_307


@pytest.mark.parametrize(
    ("width", "depth", "heads", "total"),
    [(384, 12, 6, 32_963_360), (768, 12, 12, 130_512_416), (1024, 24, 16, 458_102_816), (1152, 28, 16, 675_129_632)],
    ids=["S", "B", "L", "XL"],
)
def test_diffusion_transformers_have_their_published_parameters(width: int, depth: int, heads: int, total: int):
    """2212.09748, table 4 (33, 130, 458, 675 million): patches of 2x2 of 32x32x4 latents, learned sigma, 1000 classes.

    675,129,632 is the release's own count; it stores its 256 positions, which are sines and cosines here as there.
    """
    transformer = Transformer(width=width, depth=depth, heads=heads, mlp=4 * width)
    tower = DiTTower(DiT(patch_size=2, transformer=transformer), 8, 1000)
    assert count(tower, 32, 4) + 256 * width == total


def test_rematerialised_blocks_compute_the_same():
    outputs = []
    for remat in ("none", "products", "all"):
        transformer = Transformer(width=16, depth=2, heads=2, mlp=32, remat=remat)
        tower = DiTTower(DiT(patch_size=2, transformer=transformer), 2)
        shapes = jax.eval_shape(tower.init, KEY, X, TIME)
        random = np.random.default_rng(0)
        variables = jax.tree.map(lambda leaf, r=random: np.float32(0.3 * r.normal(size=leaf.shape)), shapes)
        loss = jax.jit(jax.grad(lambda v, tower=tower: jnp.sum(jnp.square(tower.apply(v, X, TIME, train=True)))))
        outputs.append(loss(variables))
    for output in outputs[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), output, outputs[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet(widths=(8, 12), groups=8), "must be one or more multiples of its groups (8)"),
        (lambda: UNet(widths=(8,), groups=8, heads=3), "of its heads (3), not [8]"),
        (lambda: UNet(widths=()), "must be one or more multiples"),
        (lambda: check_halved((32, 32, 32), 6), "6 pixels a side cannot be halved for each width"),
        (
            lambda: DiT(patch_size=2, transformer=Transformer(width=6, depth=1, heads=1, mlp=8)),
            "a diffusion transformer of width 6",
        ),
        (lambda: Network(backbone=UNet(widths=(32,)), classes=0), "classes is 0: it must be at least 1, or None"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(make, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        make()
