"""Stable Diffusion 1 as a pipeline of diffusers: a first stage, a U-Net that reads texts, and CLIP's text tower.

`StableDiffusionPipeline`, whose U-Net has as many heads at each resolution: not Stable Diffusion 2, whose heads have as
many features. The safety checker is left out. Of images a latent is drawn, or its mean, as the family does.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vlm_jax.data import Caption, Image, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import diffusion, latent_diffusion, text_encoder
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.unet import LatentUNet
from vlm_jax.pretrained import clip_text, schedules, unets
from vlm_jax.pretrained.denoisers import below, settled
from vlm_jax.pretrained.first_stages import WEIGHTS
from vlm_jax.pretrained.hf_towers import IDLE, text_entries, usual
from vlm_jax.pretrained.layout import Entry
from vlm_jax.pretrained.pipelines import (
    PRIOR,
    TEXT,
    UNTOLD,
    VAE,
    check_parts,
    check_prior,
    empty_caption,
    first_entries,
    first_stage,
    first_told,
    index_of,
    newer_of_vae,
    pipeline_layout,
    tokenizer_of,
)
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import CONFIG, PIPELINE, Source

KIND = "StableDiffusionPipeline"
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")
PARTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "PreTrainedTokenizerFast",
    "unet": unets.KIND,
    "scheduler": "DDIMScheduler",
}
TOWER, UNET = "text_encoder/", "unet/"
SAMPLING = diffusion.Sampling(solver="ddim", steps=50, guidance=7.5)
"""Steps and guidance of the pipeline where it is told none."""


def newer(key: str) -> str:
    """Keys of older versions of diffusers, and of newer ones of transformers, as the hub's files have them."""
    inside = key.removeprefix(TOWER)
    if key != inside and not inside.startswith(("text_model.", "text_projection.")):
        return f"{TOWER}text_model.{inside}"
    return newer_of_vae(key)


def reader(source: Source) -> text_encoder.Config:
    part = source.part("text_encoder")
    tensors = source.tensors.renamed(newer).under(TOWER)
    return clip_text.config_of("text_model.", replace(part, tensors=tensors))


def config(source: Source) -> latent_diffusion.Config:
    check_parts(source, KIND, tuple(PARTS), (*ABSENT, "requires_safety_checker"))
    unet = source.part("unet")
    network, side, channels = unets.unet_config(unet)
    text, width = reader(source), unets.told_by(unet)["cross_attention_dim"]
    if width != (made := text.network.transformer.width):  # type: ignore[union-attr]
        raise UserError(f"cross_attention_dim in {unet.path / CONFIG} is {width}, and texts have {made} features")
    first, chain = first_stage(source, side), schedules.chain(source)

    def prior() -> diffusion.Config:
        whole = Network(backbone=network)
        return diffusion.Config(image_size=side, channels=channels, levels=None, network=whole, text=text, **chain)

    return latent_diffusion.Config(first=first, prior=settled(prior, str(source.directory / PIPELINE)))


def entries(config: latent_diffusion.Config) -> Iterator[Entry]:
    prior: Any = config.prior
    yield from first_entries(config)
    yield from below(PRIOR, UNET, unets.unet_entries(prior.network.backbone, prior.image_size))
    yield from text_entries(prior.text.network, f"{TEXT}network/", f"{TOWER}text_model.")


def tokenizer(source: Source) -> Tokenizer:
    """Raises a `UserError` where texts have another length than the text tower reads."""
    length = usual(source.part("text_encoder").config, clip_text.KIND)["max_position_embeddings"]
    told = source.beside("tokenizer/tokenizer_config.json").get("model_max_length", length)
    if told != length:
        where = source.directory / "tokenizer/tokenizer_config.json"
        raise UserError(f"model_max_length in {where} is {told}, and the text encoder reads {length} tokens: mend it")
    return tokenizer_of(source)


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    config: latent_diffusion.Config = experiment.model
    prior: Any = config.prior
    check_prior(config, LatentUNet, KIND)
    reads = type(getattr(prior.text, "network", None)).__name__
    require({"prior.text.network": (reads, TextTransformer.__name__)}, KIND)
    require({"prior.network.classes": (prior.network.classes, None)}, KIND)
    if prior.variance == "learned":
        raise UserError(f"prior.variance is learned, for which a {KIND} has no channels: the model stays a run")
    text = replace(experiment, model=prior.text)
    unet = unets.told_of(prior.network.backbone, prior.image_size, prior.channels, prior.text.network.transformer.width)
    chain = schedules.told_of(prior)
    return {
        **index_of(KIND, PARTS | {"scheduler": chain["_class_name"]}, ABSENT),
        **first_told(config),
        UNET + CONFIG: unet,
        schedules.FILE: chain,
        **{f"{TOWER}{name}": told for name, told in clip_text.export(text, tokenizer).items()},
    }


LAYOUT = pipeline_layout(
    "stable-diffusion",
    KIND,
    config=config,
    entries=entries,
    fields=lambda source: (Image(), Caption()),
    sampling=lambda config: SAMPLING,
    tokenizer=tokenizer,
    idle=(f"{TOWER}{IDLE}", rf"{TOWER}text_projection\.weight"),
    known_as=newer,
    derived={UNTOLD: empty_caption},
    export=export,
    weights={VAE: WEIGHTS, UNET: WEIGHTS, TOWER: "model.safetensors"},
    tokenizer_directory="tokenizer/",
)
