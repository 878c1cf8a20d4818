"""What pipelines of diffusers have in common: an index, a first stage, a text encoder, and what tells nothing.

A pipeline goes away from what it predicts of an empty caption, where a network here has features of its own for a text
that it is not told (`Untold`). They are what the text encoder makes of the empty caption, computed once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from vlm_jax.data import Tokenizer, load_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.models import autoencoder, build, diffusion, latent_diffusion
from vlm_jax.nn.unet import LatentUNet
from vlm_jax.pretrained.clip_tokenizer import read_clip_tokenizer
from vlm_jax.pretrained.denoisers import below
from vlm_jax.pretrained.first_stages import KL, USUAL, kl_config, kl_entries, kl_told, newer, where_of
from vlm_jax.pretrained.layout import Entry, Layout
from vlm_jax.pretrained.moments import factors, moments
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import CONFIG, PIPELINE, Source

FIRST, PRIOR, TEXT = "first/", "prior/backbone/", "prior/text/"
"""Paths of the parts of a `latent_diffusion` model."""
UNTOLD = "prior/untold/features"
VAE = "vae/"
FRESH = (r"^first/objective/", r"^first/log_scale$")
"""The parameters of the first stage's loss, of which no pipeline knows."""
ABSENT = (None, False, [None, None])
"""What an index says of a part that is not there."""


def is_pipeline(source: Source, kind: str) -> bool:
    return source.config.get("_class_name") == kind and (source.directory / PIPELINE).is_file()


def pipeline_layout(name: str, kind: str, **own: Any) -> Layout:
    """That of a pipeline of a class, with what is its own."""
    common: dict[str, Any] = {
        "recognises": lambda source: is_pipeline(source, kind),
        "known_as": newer_of_vae,
        "fresh": FRESH,
        "collections": collections,
        "told": told_moments,
    }
    return Layout(name=name, family="latent_diffusion", **common | own)


def check_parts(source: Source, kind: str, parts: tuple[str, ...], idle: tuple[str, ...] = ()) -> None:
    """Refuses another pipeline, and a part that the model has not.

    Args:
      parts: that are there.
      idle: that may be there, and change nothing of what the model computes.
    """
    where, told = source.directory / PIPELINE, source.config
    if told.get("_class_name") != kind:
        raise UserError(f"_class_name in {where} is {told.get('_class_name')!r}: the layout is that of a {kind}")
    for name, value in told.items():
        if not name.startswith("_") and name not in (*parts, *idle) and value not in ABSENT:
            raise UserError(f"{name} in {where} is {value!r}, a part that the model has not: it cannot be expressed")
    for name in parts:
        if told.get(name) in ABSENT:
            raise UserError(f"{where} has no {name}: fetch all of the pipeline")


def index_of(kind: str, parts: Mapping[str, str], absent: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The inverse.

    Args:
      parts: classes of those that are there; of transformers, of whose models and tokenizers the names begin with what
        they are, or of diffusers.
      absent: those that a pipeline is told it has not.
    """
    libraries = {name: "transformers" if name in ("text_encoder", "tokenizer") else "diffusers" for name in parts}
    told = {name: [libraries[name], value] for name, value in parts.items()}
    return {PIPELINE: {"_class_name": kind, **told, **{name: [None, None] for name in absent}}}


def check_prior(config: Any, backbone: type, whose: str) -> None:
    """Refuses a prior that is none of an architecture's, by the setting's name."""
    prior = config.prior
    require({"prior": (type(prior).__module__, diffusion.__name__)}, whose)
    require({"prior.network.backbone": (type(prior.network.backbone).__name__, backbone.__name__)}, whose)


def first_stage(source: Source, side: int) -> autoencoder.Config:
    """The autoencoder of a pipeline, of images whose latents have that side, whatever size its settings name."""
    vae = source.part("vae")
    widths = vae.config.get("block_out_channels", USUAL[KL]["block_out_channels"])
    size = side * 2 ** (len(widths) - 1 if isinstance(widths, list) else 0)
    return kl_config(replace(vae, config={**vae.config, "sample_size": size}))


def first_entries(config: latent_diffusion.Config) -> Iterator[Entry]:
    return below(FIRST, VAE, kl_entries(config.first))


def collections(source: Source, config: latent_diffusion.Config) -> dict[str, np.ndarray]:
    """The moments of the latents."""
    vae = source.part("vae")
    found = moments({**USUAL[KL], **vae.config}, config.first.latent, where_of(vae))
    return {path.replace("moments/", f"moments/{FIRST}"): array for path, array in found.items()}


def told_moments(kept: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse."""
    return {VAE + CONFIG: factors({"moments": kept["moments"]["first"]})}


def first_told(config: latent_diffusion.Config) -> dict[str, dict[str, Any]]:
    """The settings of the first stage; raises a `UserError` where it is none that diffusers has."""
    if not isinstance(config.first, autoencoder.Config):
        family = type(config.first).__module__
        raise UserError(f"first is of {family} and a pipeline's first stage is an autoencoder: the model stays a run")
    return {VAE + CONFIG: kl_told(config.first)}


def newer_of_vae(key: str) -> str:
    """Keys of older files of the first stage as newer ones have them."""
    return VAE + newer(key.removeprefix(VAE)) if key.startswith(VAE) else key


def tokenizer_of(source: Source) -> Tokenizer:
    """That of a pipeline; raises a `UserError` where there is none that can be read."""
    directory = source.part("tokenizer").directory
    path = directory / "tokenizer.json"
    found = load_tokenizer(path) if path.is_file() else read_clip_tokenizer(directory)
    if found is None:
        command = f"t = AutoTokenizer.from_pretrained('{directory}'); t.save_pretrained('{directory}')"
        raise UserError(
            f"{directory} has neither a tokenizer.json nor a vocab.json and merges.txt: where transformers and "
            f'sentencepiece are, run python -c "from transformers import AutoTokenizer; {command}"'
        )
    return found


def empty_caption(config: Any, params: Mapping[str, Any], tokenizer: Tokenizer | None) -> np.ndarray:
    """[T, D] float32: what the text encoder makes of a caption without a word, as the network reads it.

    A U-Net reads padding, too. Of PixArt nothing but the text is read, and here all places of what stands for one that
    is not told: the features of the text fill them, which an attention cannot tell from their being there once.

    Raises:
      UserError: there is no tokenizer.
    """
    if tokenizer is None:
        raise UserError("the model is told texts and there is no tokenizer for the empty one: bring its tokenizer.json")
    reader = build(config.prior.text)
    assert reader.text_features is not None
    tokens = tokenizer.encode([""], reader.inputs["tokens"].shape[0])
    # On the host, where an array of NumPy is one of its own.
    cpu, text = jax.devices("cpu")[0], params["prior"]["text"]
    variables = {"params": jax.tree.map(lambda leaf: jax.device_put(leaf, cpu, may_alias=True), text)}
    features, inside = jax.jit(reader.text_features)(variables, jax.device_put(tokens, cpu))
    found = np.asarray(features[0], np.float32)
    if isinstance(config.prior.network.backbone, LatentUNet):
        return found
    own = found[np.asarray(inside[0])]
    return np.tile(own, (-(-len(found) // len(own)), 1))[: len(found)]
