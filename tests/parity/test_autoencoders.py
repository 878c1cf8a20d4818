"""First stages of random, perturbed weights compute what diffusers computes, by every layout, and go there and back."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.numpy import save_file

from converted import assert_trees_equal
from vlm_jax.data import Data, Image
from vlm_jax.experiment import Experiment
from vlm_jax.models import build
from vlm_jax.models.autoencoder import Autoencoder
from vlm_jax.models.vqvae import VQVAE
from vlm_jax.pretrained import LAYOUTS, first_stages
from vlm_jax.pretrained.layout import named, recognised, written, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.pretrained.variables import read_variables
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

IMAGE = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
SIZES: dict[str, Any] = {"block_out_channels": (32, 64, 64), "layers_per_block": 2, "sample_size": 32}
PLAIN = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
ATTENTIVE = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
KL = {"latent_channels": 3, "scaling_factor": 0.7, "shift_factor": 0.3}
VQ = {"latent_channels": 6, "num_vq_embeddings": 50, "vq_embed_dim": 4}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "kl": (AutoencoderKL, {**SIZES, **PLAIN, **KL}),
    "kl of attention": (AutoencoderKL, {**SIZES, **ATTENTIVE, **KL, "norm_num_groups": 16}),
    "vq": (VQModel, {**SIZES, **ATTENTIVE, **VQ}),
}
FAINT = 0.03
"""Of the first layers' kernels: features that are hardly there, of which a norm's epsilon is a part that one sees."""


def theirs(name: str) -> Any:
    """A model of random weights, of which none is where it starts: norms and biases, too."""
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    model = kind(**settings).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if "conv_in" in key:
                parameter.mul_(FAINT)
            if key == "quantize.embedding.weight":
                parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=MODELS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A model of theirs, and the directory where they have saved it."""
    model, path = theirs(request.param), tmp_path_factory.mktemp("published")
    model.save_pretrained(path)
    return request.param, model, path


def read(path: Path) -> tuple[str, Any, Any]:
    """The layout, config and variables of a directory."""
    source = open_source(path)
    layout = recognised(source, LAYOUTS)
    config = layout.config(source)
    return layout.name, config, jax.tree.map(jnp.asarray, read_variables(layout, config, source)[0])


def outputs(model: Any, *, unit: bool = False) -> dict[str, np.ndarray]:
    """What theirs makes of the images, channels last.

    Args:
      unit: features and codes have unit length, as LlamaGen's, which diffusers has not.
    """

    def last(x: torch.Tensor) -> np.ndarray:
        return x.permute(0, 2, 3, 1).numpy()

    x = torch.from_numpy(np.float32(IMAGE / 127.5 - 1)).permute(0, 3, 1, 2)
    with torch.no_grad():
        if isinstance(model, AutoencoderKL):
            found = model.encode(x).latent_dist
            scaled = (found.mean - model.config.shift_factor) * model.config.scaling_factor
            pixels = model.decode(found.mean).sample
            return {
                "mean": last(found.mean),
                "log_variance": last(found.logvar),
                "latents": last(scaled),
                "pixels": last(pixels),
            }
        z = model.encode(x).latents
        if unit:
            z = torch.nn.functional.normalize(z, dim=1)
            vectors = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=-1)
            model.quantize.embedding.weight.copy_(vectors)
        value, _, (_, _, codes) = model.quantize(z)
        pixels = model.decode(value, force_not_quantize=True).sample
    return {"codes": codes.numpy().reshape(2, 8, 8), "pixels": last(pixels)}


def ours(config: Any, variables: Any) -> dict[str, np.ndarray]:
    model, kind = build(config), Autoencoder if hasattr(config, "latent") else VQVAE
    module: Any = kind(config)

    @jax.jit
    def run(variables: Any) -> dict[str, jax.Array]:
        latents = model.encode(variables, IMAGE)
        if kind is VQVAE:
            return {"codes": latents, "pixels": module.apply(variables, latents, method="decode")}
        mean, log_variance = module.apply(variables, IMAGE, method="encode")
        pixels = module.apply(variables, mean, method="decode")
        return {"mean": mean, "log_variance": log_variance, "latents": latents, "pixels": pixels}

    return run(variables)


def assert_equal(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    """To 1e-5 of the largest value; codes exactly."""
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        atol = 0 if key == "codes" else 1e-5 * max(1, np.abs(array).max())
        np.testing.assert_allclose(found[key], array, rtol=0, atol=atol, err_msg=key)


def test_a_published_autoencoder_computes_what_diffusers_does(published: tuple[str, Any, Path]):
    name, model, path = published
    layout, config, variables = read(path)
    assert layout == ("vq_model" if name == "vq" else "autoencoder_kl")
    expected = outputs(model)
    assert np.std(expected["pixels"], axis=(0, 1, 2)).min() > 0.05
    assert name != "vq" or len(np.unique(expected["codes"])) > 10
    assert_equal(ours(config, variables), expected)


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_a_setting_that_is_left_out_is_what_it_is_there(kind: type):
    """Of diffusers' own signatures; what is expressed in one way only is so by default."""
    usual = {
        name: list(setting.default) if isinstance(setting.default, tuple) else setting.default
        for name, setting in inspect.signature(kind.__init__).parameters.items()
    }
    assert first_stages.USUAL[kind.__name__] == {name: usual[name] for name in first_stages.USUAL[kind.__name__]}
    assert {name: usual[name] for name in first_stages.ONLY if name in usual}.items() <= first_stages.ONLY.items()


def test_decoded_images_are_theirs_within_a_level(published: tuple[str, Any, Path]):
    """As integers, of the latents that a pipeline hands over."""
    name, model, path = published
    _, config, variables = read(path)
    expected = outputs(model)
    latents = expected["codes" if name == "vq" else "latents"]
    copies = np.asarray(jax.jit(build(config).decode)(variables, latents), np.float64)
    np.testing.assert_allclose(copies, np.clip(127.5 * (expected["pixels"] + 1), 0, 255), atol=0.51)


def experiment_of(config: Any) -> Experiment:
    training = Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1)
    return Experiment(model=config, data=Data(name=None, fields=(Image(),)), training=training)


def write(name: str, path: Path, config: Any, variables: Any) -> dict[str, np.ndarray]:
    """What `tools.convert` writes, and its arrays."""
    layout, params = named(LAYOUTS, name), variables["params"]
    assert layout.export is not None
    told = layout.told({key: tree for key, tree in variables.items() if key != "params"})
    path.mkdir()
    for file, content in layout.export(experiment_of(config), None).items():
        (path / file).write_text(json.dumps({**content, **told.get(file, {})}))
    arrays = dict(written(layout, config, params, written_keys(layout, config, params)))
    save_file(arrays, path / layout.weights[""], metadata={"format": "pt"})
    return arrays


def moved(variables: Any) -> Any:
    """Other parameters."""
    random = np.random.default_rng(1)
    return {
        **variables,
        "params": jax.tree.map(
            lambda leaf: leaf + np.float32(0.05 * random.normal(size=leaf.shape)), variables["params"]
        ),
    }


def test_what_is_written_is_read_by_diffusers(published: tuple[str, Any, Path], tmp_path: Path):
    """No key is missing, none too many, and the settings are those that it computes the same with."""
    name, model, path = published
    layout, config, variables = read(path)
    variables = moved(variables)
    arrays = write(layout, tmp_path / "out", config, variables)
    assert arrays.keys() == model.state_dict().keys()
    loaded, found = MODELS[name][0].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for setting in (*SIZES, *PLAIN, *(VQ if name == "vq" else KL), "norm_num_groups"):
        value = loaded.config[setting]
        assert (tuple(value) if isinstance(value, list) else value) == model.config[setting], setting
    assert_equal(ours(config, variables), outputs(loaded.eval()))


@pytest.mark.parametrize("published", ["kl"], indirect=True)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_compvis_s_names_are_those_that_diffusers_converts(
    published: tuple[str, Any, Path], prefix: str, tmp_path: Path
):
    """By diffusers' own script of conversion; and what is read of them computes the same."""
    _, model, path = published
    _, config, variables = read(path)
    arrays = {
        f"{prefix}{key}": x for key, x in write("autoencoder_kl-compvis", tmp_path / "out", config, variables).items()
    }
    torches = {key: torch.from_numpy(x.copy()) for key, x in arrays.items()}
    converted = convert_ldm_vae_checkpoint(torches, dict(model.config))
    assert converted.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        np.testing.assert_array_equal(converted[key].numpy(), tensor.numpy(), err_msg=key)
    save_file(arrays, tmp_path / "out" / "model.safetensors")
    layout, again, same = read(tmp_path / "out")
    assert (layout, again) == ("autoencoder_kl-compvis", config)
    assert_trees_equal(same, variables)


@pytest.mark.parametrize("published", ["vq"], indirect=True)
@pytest.mark.parametrize("name", ["vqgan", "vqgan-llamagen"])
def test_codes_of_other_releases_are_those_of_the_same_arrays(
    published: tuple[str, Any, Path], name: str, tmp_path: Path
):
    """LlamaGen's have unit length, which is done by hand to diffusers' networks."""
    _, _, path = published
    _, config, variables = read(path)
    unit = name == "vqgan-llamagen"
    config = replace(config, quantizer=replace(config.quantizer, unit=unit))
    write(name, tmp_path / "out", config, variables)
    layout, again, same = read(tmp_path / "out")
    assert (layout, again) == (name, config)
    expected = outputs(theirs("vq"), unit=unit)
    assert_equal(ours(again, same), expected)
    plain = outputs(theirs("vq"))
    assert (np.abs(expected["pixels"] - plain["pixels"]).max() > 0.01) == unit
