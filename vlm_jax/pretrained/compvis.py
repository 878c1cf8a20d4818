"""First stages by the key names of CompVis's releases, and of LlamaGen's, in a safetensors file.

The latent diffusion and Stable Diffusion releases (`AutoencoderKL`), taming-transformers (`VQModel`) and LlamaGen
publish no settings beside the weights. Sizes are those of the arrays. That 32 groups of channels are normalised, and
images have 256 pixels a side, is so of all that they have published: a size matters by the heights that have attention.
A `config.json` beside the file, in diffusers' words, may tell of another `sample_size`, and of the `scaling_factor` of
latents, which else is that of a whole model's file that has measured it, else 1: Stable Diffusion's 0.18215 stands in
none of its files. The loss is as in `first_stages.py`.

A whole model's file holds the first stage under a prefix; the rest of it is left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.data import Image, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder, vqvae
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.quantize import Learned
from vlm_jax.pretrained.first_stages import FRESH, check_codes, codes_entry, projections, where_of
from vlm_jax.pretrained.layout import Entry, Layout
from vlm_jax.pretrained.moments import factors, moments
from vlm_jax.pretrained.pyramids import COMPVIS, CONV_IN, LLAMAGEN, Names, pyramid_entries, pyramid_of
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import CONFIG, Source

PREFIX = "first_stage_model."
GROUPS = 32
SIZE = 256
SCALE = "scale_factor"
IDLE = (
    r"(model|model_ema|cond_stage_model|conditioner|denoiser|transformer|permuter|loss)\..*",
    r"betas|(sqrt_|log_|posterior_|alphas_)\w+|lvlb_weights|logvar|global_step|colorize",
    SCALE,
    r"quantize\.codebook_used",
)
"""What else a whole model's file holds, its loss and its schedule of noise; and how LlamaGen's codes were used."""


def plain(key: str) -> str:
    return key.removeprefix(PREFIX)


def held_by(source: Source, key: str) -> bool:
    return key in source.tensors or PREFIX + key in source.tensors


def stage(source: Source, names: Names) -> dict[str, Any]:
    """The arguments that both families have; raises a `UserError` where sizes cannot be made out."""
    tensors, size = source.tensors.renamed(plain), source.config.get("sample_size", SIZE)
    for key in (CONV_IN, "encoder.conv_out.weight", "quant_conv.weight"):
        if key not in tensors or len(tensors.shape(key)) != 4:
            raise UserError(f"{source.path} lacks {key}, a convolution, by which the size of a first stage is known")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"sample_size in {where_of(source)} is {size!r}: it must be a number of pixels")
    return {
        "image_size": size,
        "channels": tensors.shape(CONV_IN)[1],
        "network": pyramid_of(tensors, size, names, GROUPS),
        "objective": Adversarial(),
    }


def kl_config(source: Source) -> autoencoder.Config:
    shared = stage(source, COMPVIS)
    return autoencoder.Config(**shared, latent=source.tensors.renamed(plain).shape("encoder.conv_out.weight")[0] // 2)


def vq_config(source: Source, names: Names, *, unit: bool) -> vqvae.Config:
    shared, tensors = stage(source, names), source.tensors.renamed(plain)
    size, width = tensors.shape("quantize.embedding.weight")
    hidden = tensors.shape("encoder.conv_out.weight")[0]
    return vqvae.Config(**shared, hidden=hidden, quantizer=Learned(size=size, width=width, unit=unit))


def kl_entries(config: autoencoder.Config) -> Iterator[Entry]:
    yield from pyramid_entries(config.network, config.image_size, COMPVIS)
    yield from projections("posterior", "latent")


def vq_entries(config: vqvae.Config, names: Names) -> Iterator[Entry]:
    yield from pyramid_entries(config.network, config.image_size, names)
    yield from projections("features", "latent")
    yield codes_entry()


def collections(source: Source, config: autoencoder.Config) -> dict[str, np.ndarray]:
    """The moments that a file or the settings beside it tell."""
    measured = {"scaling_factor": source.tensors[SCALE]} if SCALE in source.tensors else {}
    told: Mapping[str, Any] = {"scaling_factor": 1.0, **measured, **source.config}
    return moments(told, config.latent, where_of(source))


def told_of(config: autoencoder.Config | vqvae.Config, whose: str) -> dict[str, dict[str, Any]]:
    """What the arrays do not tell."""
    require({"levels": (config.levels, 256), "network.groups": (config.network.groups, GROUPS)}, whose)
    return {CONFIG: {"sample_size": config.image_size}}


def kl_export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    return told_of(experiment.model, "CompVis")


def fields(source: Source) -> tuple[Image, ...]:
    return (Image(),)


def codes_layout(name: str, names: Names, *, unit: bool) -> Layout:
    """A layout of `VQModel`; `unit`: codes have unit length."""
    first = f"{names.down.format(0)}.{names.block.format(0)}.norm1.weight"

    def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
        check_codes(experiment.model, unit=unit, whose=name)
        return told_of(experiment.model, name)

    return Layout(
        name=name,
        family="vqvae",
        recognises=lambda source: held_by(source, first) and held_by(source, "quantize.embedding.weight"),
        config=lambda source: vq_config(source, names, unit=unit),
        entries=lambda config: vq_entries(config, names),
        fields=fields,
        idle=IDLE,
        known_as=plain,
        fresh=FRESH,
        export=export,
    )


LAYOUTS = (
    Layout(
        name="autoencoder_kl-compvis",
        family="autoencoder",
        recognises=lambda source: (
            held_by(source, "encoder.down.0.block.0.norm1.weight") and not held_by(source, "quantize.embedding.weight")
        ),
        config=kl_config,
        entries=kl_entries,
        fields=fields,
        idle=IDLE,
        known_as=plain,
        fresh=FRESH,
        collections=collections,
        told=lambda collections: {CONFIG: factors(collections)},
        export=kl_export,
    ),
    codes_layout("vqgan", COMPVIS, unit=False),
    codes_layout("vqgan-llamagen", LLAMAGEN, unit=True),
)
