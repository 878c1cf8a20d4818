"""Networks that are told a text: what they read of it, what in its place where they are told nothing, and guidance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import ACTIVATIONS, attention, dense, group_norm, layer_norm, mlp, random_params, silu
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Text, Told
from vlm_jax.nn.denoiser import Denoiser, Guidance, Network, check_network
from vlm_jax.nn.dit import DiT, position_features
from vlm_jax.nn.pixart import PixArt, PixArtTower
from vlm_jax.nn.spatial_transformer import SpatialTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import SD15, LatentUNet, UNet, UNetBlock, UNetTower
from vlm_jax.nn.vision import patchify, unpatchify
from vlm_jax.trees import count_parameters

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = np.float32(RANDOM.normal(size=(3, 4, 4, 2)))
TIME = np.float32([0, 500, 999])
FEATURES = np.float32(RANDOM.normal(size=(3, 5, 6)))
INSIDE = np.arange(5) < np.array([[2], [5], [3]])
TEXT = Text(FEATURES, INSIDE, np.ones(3, bool))
TRANSFORMER = Transformer(width=8, depth=2, heads=2, mlp=12, norm_eps=0.3, scan=False)
NETWORKS = {
    "unet": Network(backbone=LatentUNet(widths=(8, 16), blocks=1, attention=(2,), heads=2, groups=4)),
    "pixart": Network(backbone=PixArt(patch_size=2, transformer=TRANSFORMER)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Its name, its jitted function, and its variables, none of them as initialised."""
    module = Denoiser(NETWORKS[request.param], 2)
    params = random_params(jax.eval_shape(module.init, KEY, X, TIME, Told(None, TEXT)), scale=0.3)
    return request.param, jax.jit(module.apply, static_argnames=("guidance", "guided")), params


def test_the_output_depends_on_what_the_text_says(network):
    name, apply, variables = network
    y = apply(variables, X, TIME, Told(None, TEXT))
    changed = FEATURES.copy()
    changed[0, 1] += 1  # within the first text
    changed[2, 3] += 1  # in the padding of the third
    other = apply(variables, X, TIME, Told(None, TEXT._replace(features=changed)))
    moved = np.abs(other - y).max(axis=(1, 2, 3)) > 1e-3
    assert moved.tolist() == [True, False, name == "unet"]  # which reads padding, as Stable Diffusion does


def test_a_text_that_is_not_told_is_what_is_learned_for_it_and_all_of_that_is_read(network):
    _, apply, variables = network
    known = np.array([True, False, True])
    y = apply(variables, X, TIME, Told(None, TEXT._replace(known=known)))
    learned = FEATURES.copy()
    learned[1] = variables["params"]["untold"]["features"]
    inside = INSIDE.copy()
    inside[1] = True
    expected = apply(variables, X, TIME, Told(None, Text(learned, inside, np.ones(3, bool))))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    short = TEXT._replace(inside=np.tile(INSIDE[:1], (3, 1)), known=known)
    np.testing.assert_allclose(apply(variables, X, TIME, Told(None, short))[1], y[1], atol=1e-5)


def test_guidance_goes_away_from_the_prediction_that_is_told_nothing(network):
    _, apply, variables = network
    told = apply(variables, X, TIME, Told(None, TEXT))
    untold = apply(variables, X, TIME, Told(None, TEXT._replace(known=np.zeros(3, bool))))
    guided = untold + 2.5 * (told - untold)
    y = apply(variables, X, TIME, Told(None, TEXT), guidance=Guidance(2.5))
    np.testing.assert_allclose(y, guided, atol=1e-4)
    y = apply(variables, X, TIME, Told(None, TEXT), guidance=Guidance(2.5, rescale=0.7))
    brought = guided * np.std(told, axis=(1, 2, 3), keepdims=True) / np.std(guided, axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(y, 0.7 * brought + 0.3 * guided, atol=1e-4)  # 2305.08891, equation 16


def test_a_spatial_transformer_is_that_of_latent_diffusion():
    """2112.10752, appendix E.2.1, with the constants of its release."""
    module = SpatialTransformer(heads=2, groups=4)
    x = np.float32(RANDOM.normal(size=(3, 2, 2, 8)))
    for text in (TEXT, None):
        shapes = jax.eval_shape(lambda key, t=text: module.init(key, x, t, train=False), KEY)["params"]
        params = random_params(shapes)
        y = dense(params["into"], group_norm(params["norm"], x, 4, 1e-6).reshape(3, 4, 8))
        z = layer_norm(params["map_norm"], y, 1e-5)
        y = y + attention(params["to_map"], z, z, 2)
        z = layer_norm(params["text_norm"], y, 1e-5)
        y = y + attention(params["to_text"], z, z if text is None else FEATURES, 2)
        z = layer_norm(params["mlp_norm"], y, 1e-5)
        hidden = dense(params["mlp"]["up"], z) * ACTIVATIONS["gelu"](dense(params["mlp"]["gate"], z))
        y = y + dense(params["mlp"]["down"], hidden)
        expected = x + dense(params["out"], y).reshape(x.shape)
        found = jax.jit(lambda p, t=text: module.apply({"params": p}, x, t, train=False))(params)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        assert not any("bias" in params[name][part] for name in ("to_map", "to_text") for part in ("query", "value"))


def test_the_blocks_of_latent_diffusion_have_its_epsilon():
    """1e-5, where DDPM's have 1e-6: of inputs as small as these it shows."""
    x, condition = np.float32(1e-3 * X[..., [0, 1, 0, 1]]), np.zeros((3, 4), np.float32)
    for config, epsilon in ((LatentUNet(widths=(4,), groups=1), 1e-5), (UNet(widths=(4,), groups=1), 1e-6)):
        module = UNetBlock(config, 4)
        variables = module.init(KEY, x, condition, train=False)
        _, found = module.apply(
            variables, x, condition, train=False, capture_intermediates=True, mutable=["intermediates"]
        )
        (normalised,) = found["intermediates"]["norm_in"]["__call__"]
        expected = group_norm({"scale": 1.0, "bias": 0.0}, x, 1, epsilon)
        np.testing.assert_allclose(normalised, expected, rtol=1e-3, atol=1e-4)


def test_pixart_is_that_of_its_paper():
    """2310.00426, section 2.3: one layer for all blocks and a table for each, and the text between the two branches."""
    tower = PixArtTower(PixArt(patch_size=2, transformer=TRANSFORMER), 2)
    params = random_params(jax.eval_shape(tower.init, KEY, X, TIME, None, TEXT)["params"], scale=0.3)
    angles = TIME[:, None].astype(np.float64) * 10_000.0 ** -np.linspace(0, 1, 128, endpoint=False)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    condition = dense(params["conditioning"]["time_out"], silu(dense(params["conditioning"]["time_in"], waves)))
    shared = dense(params["modulation"], silu(condition)).reshape(3, 6, 8)
    text = mlp(params["text"], FEATURES, "gelu_tanh")
    x = dense(params["patch"], patchify(X, 2)) + position_features(2, 8)
    for block in (params["block_0"], params["block_1"]):
        table = np.split(shared + block["modulation"]["table"], 6, axis=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table
        y = layer_norm({}, x, 0.3) * (1 + scale) + shift
        x = x + gate * attention(block["attention"], y, y, 2)
        x = x + attention(block["reading"], x, text, 2, INSIDE[:, None])
        y = layer_norm({}, x, 0.3) * (1 + mlp_scale) + mlp_shift
        x = x + mlp_gate * mlp(block["mlp"], y, "gelu_tanh")
    shift, scale = np.split(condition[:, None] + params["last_modulation"]["table"], 2, axis=1)
    expected = unpatchify(dense(params["last"], layer_norm({}, x, 0.3) * (1 + scale) + shift), 2, 2)
    found = jax.jit(lambda p: tower.apply({"params": p}, X, TIME, None, TEXT))(params)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_networks_start_as_ones_that_read_nothing():
    for config in NETWORKS.values():
        module = Denoiser(config, 2)
        y, variables = jax.jit(lambda m=module: m.init_with_output(KEY, X, TIME, Told(None, TEXT)))()
        np.testing.assert_array_equal(y, 0)
        assert count_parameters(variables["params"]["untold"]) == 5 * 6


def test_stable_diffusions_network_has_its_859_520_964_parameters():
    """In 686 arrays, as the release has them: ours keep the two halves of each GEGLU apart, of 16 transformers."""
    text = jax.eval_shape(lambda: Text(jnp.zeros((1, 77, 768)), jnp.ones((1, 77), bool), jnp.ones(1, bool)))
    x, time = jax.ShapeDtypeStruct((1, 64, 64, 4), "float32"), jax.ShapeDtypeStruct((1,), "float32")
    params = jax.eval_shape(UNetTower(SD15, 4).init, KEY, x, time, None, text)["params"]
    assert count_parameters(params) == 859_520_964
    assert len(jax.tree.leaves(params)) == 686 + 16 * 2


def test_networks_that_read_no_text_are_not_given_one_and_pixart_is():
    transformer = Transformer(width=8, depth=1, heads=2, mlp=8)
    for backbone in (UNet(widths=(8,), groups=4), DiT(patch_size=1, transformer=transformer)):
        check_network(Network(backbone=backbone), 4, reads=False)
        with pytest.raises(UserError, match=rf"its network a {type(backbone).__name__}, which reads no text: choose"):
            check_network(Network(backbone=backbone), 4, reads=True)
    with pytest.raises(UserError, match=r"PixArt's transformer reads a text and the model has no text encoder"):
        check_network(NETWORKS["pixart"], 4, reads=False)
