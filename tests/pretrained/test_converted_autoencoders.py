"""First stages of other trainings as runs: their moments, what is drawn, what is measured, and the way back."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converted import assert_trees_equal
from reference import random_params
from tools.convert import convert
from tools.data import OtherData
from tools.evaluate import evaluate
from tools.sample import Options, sample
from vlm_jax.contract import abstract_batch
from vlm_jax.models import autoencoder, build, vqvae
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.quantize import Learned
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.layout import abstract_params, named, written, written_keys
from vlm_jax.trees import leaves_by_path
from vlm_jax.workdir import load

NETWORK = Pyramid(widths=(32, 32), blocks=1)
KL = autoencoder.Config(image_size=32, network=NETWORK, latent=3, objective=Adversarial())
SHIFT, SCALE = 0.0609, 1.5305
"""Stable Diffusion 3's."""
SETTINGS = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 32],
    "latent_channels": 3,
    "shift_factor": SHIFT,
    "scaling_factor": SCALE,
}


def write(name: str, directory: Path, config: Any, settings: dict[str, Any]) -> Path:
    """Random parameters as they are published."""
    layout, params = named(LAYOUTS, name), random_params(abstract_params(config), 0.2)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    arrays = dict(written(layout, config, params, written_keys(layout, config, params)))
    save_file(arrays, directory / layout.weights[""])
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("autoencoder_kl", tmp_path_factory.mktemp("published") / "vae", KL, SETTINGS)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("converted") / "run"
    told = convert(str(source), workdir)
    assert re.search(
        r"parameters in float32, of layout autoencoder_kl; 2,765,633 of them are drawn, which no such", told
    )
    return workdir


def test_a_converted_run_has_the_moments_and_a_critic_that_knows_nothing(run: Path):
    loaded = load(run)
    assert loaded.experiment.model == KL and loaded.model.log_likelihood is None
    moments, said = loaded.variables["moments"], loaded.variables["said"]["objective"]
    np.testing.assert_array_equal(moments["mean"], np.full(3, SHIFT, np.float32))
    np.testing.assert_allclose(moments["square"] - moments["mean"] ** 2, 1 / SCALE**2, rtol=1e-6)
    assert_trees_equal(said, {"real": np.float32(0), "fake": np.float32(0)})
    critic = leaves_by_path(loaded.variables["params"]["objective"])
    assert np.std(critic["critic/conv_1/kernel"]) > 0.01 and not np.any(critic["critic/conv_0/bias"])


def test_its_latents_are_those_that_a_pipeline_reads(run: Path):
    """(z - shift_factor) * scaling_factor, and back."""
    loaded = load(run)
    module: Any = autoencoder.Autoencoder(KL)
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    latents = jax.jit(loaded.model.encode)(loaded.variables, image)
    mean, pixels = jax.jit(
        lambda variables: (
            mean := module.apply(variables, image, method="encode")[0],
            module.apply(variables, mean, method="decode"),
        )
    )(loaded.variables)
    np.testing.assert_allclose(latents, (np.float64(mean) - SHIFT) * SCALE, rtol=1e-4, atol=1e-4)
    copies = np.asarray(jax.jit(loaded.model.decode)(loaded.variables, latents), np.float64)
    np.testing.assert_allclose(copies, np.clip(127.5 * (np.float64(pixels) + 1), 0, 255), atol=0.51)


@pytest.mark.parametrize("layout", ["autoencoder_kl", "autoencoder_kl-compvis"])
def test_a_converted_run_goes_back_with_its_moments(layout: str, source: Path, run: Path, tmp_path: Path):
    convert(str(run), tmp_path / "out", layout=layout)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["scaling_factor"], told["shift_factor"], told["sample_size"]) == (SCALE, SHIFT, 32)
    convert(str(tmp_path / "out"), tmp_path / "again")
    first, again = load(run), load(tmp_path / "again")
    assert again.experiment == first.experiment
    assert_trees_equal(again.variables, first.variables)
    if layout == "autoencoder_kl":
        file = "diffusion_pytorch_model.safetensors"
        assert_trees_equal(load_file(tmp_path / "out" / file), load_file(source / file))


def test_weights_in_bfloat16_stay_so_and_moments_in_float32(source: Path, tmp_path: Path):
    file, half = "diffusion_pytorch_model.safetensors", shutil.copytree(source, tmp_path / "half")
    save_file({key: array.astype(jnp.bfloat16) for key, array in load_file(source / file).items()}, half / file)
    assert "parameters in bfloat16" in convert(str(half), tmp_path / "run")
    loaded = load(tmp_path / "run")
    kinds = {name: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} for name, tree in loaded.variables.items()}
    assert kinds == {"params": {"bfloat16"}, "moments": {"float32"}, "said": {"float32"}}
    assert loaded.experiment.model.network.dtype == "bfloat16"
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
    assert jax.eval_shape(loaded.model.encode, loaded.variables, image).dtype == jnp.float32


@pytest.mark.slow
def test_a_converted_run_is_evaluated_and_drawn_from(run: Path, data_dir: Path, tmp_path: Path):
    out = tmp_path / "eval.json"
    data = OtherData(name="digits")
    results = evaluate(run, data, split="train[:4]", data_dir=str(data_dir), batch_size=4, out=out)
    assert results["reconstruction/psnr"] > 0 and not any("likelihood" in name for name in results)
    drawn = sample(run, Options(num=2, data=data, split="train", data_dir=str(data_dir), out=tmp_path / "sheet.png"))
    assert isinstance(drawn, Path) and drawn.stat().st_size > 1000


def test_what_a_run_keeps_beside_its_parameters_begins_as_the_model_s(tmp_path: Path):
    """Of codes: that none has been seen lately."""
    config = vqvae.Config(
        image_size=32, network=NETWORK, hidden=5, quantizer=Learned(size=7, width=4), objective=Adversarial()
    )
    convert(str(write("vqgan", tmp_path / "source", config, {"sample_size": 32})), tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.experiment.model == config
    model = build(config)
    begun = jax.eval_shape(model.init, jax.random.key(0), abstract_batch(model.inputs, 1))
    assert jax.tree.structure(begun) == jax.tree.structure(loaded.variables)
    np.testing.assert_array_equal(loaded.variables["use"]["age"], np.full(7, 65_536.0))
