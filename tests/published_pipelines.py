"""Small pipelines as diffusers publishes them, made for the tests: random parameters in a directory of directories."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from converted import TOKENIZER
from reference import random_params
from vlm_jax.data import Caption, Data, Image, Tokenizer
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder, diffusion, latent_diffusion, text_encoder
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.dit import DiT
from vlm_jax.nn.pixart import PixArt
from vlm_jax.nn.t5 import T5
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import LatentUNet
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.convert import files_of
from vlm_jax.pretrained.layout import abstract_params, named, nested, written, written_keys
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.trees import leaves_by_path

READER = replace(TOKENIZER, bos_id=None, eos_id=TOKENIZER.vocab_size - 1)
"""Which begins texts with no token, and ends them with the highest."""
LATENTS: dict[str, Any] = {"image_size": 8, "channels": 4, "levels": None}
FIRST = autoencoder.Config(
    image_size=32, network=Pyramid(widths=(32, 32, 32), blocks=1), latent=4, objective=Adversarial()
)
TOWER = Transformer(width=12, depth=2, heads=3, mlp=20, activation="quick_gelu", norm_eps=1e-5)
ENCODERS: dict[str, Any] = {"vocab_size": READER.vocab_size, "eos_id": READER.eos_id}
CLIP = TextTransformer(**ENCODERS, context_length=12, transformer=TOWER)
ENCODER = T5(**ENCODERS, context_length=120, width=10, depth=2, heads=2, head_width=3, mlp=14)
BLOCKS = Transformer(width=8, depth=2, heads=2, mlp=32)
UNET = LatentUNet(widths=(8, 8, 16), blocks=2, attention=(2, 8), heads=2, groups=4)
PRIORS = {
    "stable-diffusion": diffusion.Config(
        **LATENTS, network=Network(backbone=UNET), text=text_encoder.Config(network=CLIP), betas="scaled_linear"
    ),
    "dit": diffusion.Config(
        **LATENTS, network=Network(backbone=DiT(patch_size=2, transformer=BLOCKS), classes=5), variance="learned"
    ),
    "pixart": diffusion.Config(
        **LATENTS,
        network=Network(backbone=PixArt(patch_size=2, transformer=BLOCKS)),
        text=text_encoder.Config(network=ENCODER),
        variance="learned",
    ),
}
SMALL = replace(BLOCKS, width=384, depth=1, heads=6, mlp=16)
CONFIGS: dict[str, Any] = {
    **{name: latent_diffusion.Config(first=FIRST, prior=prior) for name, prior in PRIORS.items()},
    "dit-original": diffusion.Config(
        **LATENTS, network=Network(backbone=DiT(patch_size=2, transformer=SMALL), classes=5), variance="learned"
    ),
}
MOMENTS = {"moments": {"first": {"mean": np.float32([0.25] * 4), "square": np.float32([0.25**2 + 4] * 4)}}}
"""Of latents whose scaling_factor is 0.5 and shift_factor 0.25."""


def prior_of(config: Any, **changes: Any) -> Any:
    """A model of another prior."""
    return replace(config, prior=replace(config.prior, **changes))


def backbone_of(config: Any, **changes: Any) -> Any:
    """A model of another network."""
    network = config.prior.network
    return prior_of(config, network=replace(network, backbone=replace(network.backbone, **changes)))


def experiment_of(config: Any) -> Experiment:
    training = Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1)
    return Experiment(model=config, data=Data(name=None, fields=(Image(), Caption())), training=training)


def exported(name: str, config: Any, tokenizer: Tokenizer | None = READER) -> dict[str, dict[str, Any]]:
    """The JSON files that a layout writes."""
    layout = named(LAYOUTS, name)
    assert layout.export is not None
    files = dict(layout.export(experiment_of(config), tokenizer))
    for file, told in layout.told(MOMENTS).items():
        files[file] = {**files[file], **told}
    return files


def arrays_of(name: str, config: Any, params: Any) -> dict[str, np.ndarray]:
    """By the layout's keys; without what is derived."""
    layout = named(LAYOUTS, name)
    params = nested({path: leaf for path, leaf in leaves_by_path(params).items() if path not in layout.derived})
    return dict(written(layout, config, params, written_keys(layout, config, params)))


def write_arrays(name: str, directory: Path, arrays: dict[str, np.ndarray]) -> None:
    files, _ = files_of(named(LAYOUTS, name).weights, {key: array.nbytes for key, array in arrays.items()})
    for file in files:
        (directory / file.directory).mkdir(parents=True, exist_ok=True)
        held = {key.removeprefix(file.directory): arrays[key] for key in file.keys}
        save_file(held, directory / file.directory / file.name)


def publish(name: str, directory: Path, config: Any = None) -> tuple[Any, dict[str, np.ndarray]]:
    """Random parameters in a directory, and the arrays that they were written as."""
    config = CONFIGS[name] if config is None else config
    params = random_params(abstract_params(config), 0.2)
    arrays = arrays_of(name, config, params)
    write_arrays(name, directory, arrays)
    for file, content in exported(name, config).items():
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text(json.dumps(content))
    if named(LAYOUTS, name).derived:
        (directory / "tokenizer").mkdir()
        READER.save(directory / "tokenizer" / "tokenizer.json")
    return params, arrays


def change(path: Path, **told: Any) -> None:
    """Other settings of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
