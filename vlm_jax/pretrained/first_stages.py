"""First stages in safetensors as diffusers keeps them: `AutoencoderKL` of Stable Diffusion and others, and `VQModel`.

Files have neither the scales of a likelihood nor who looks at copies. Such a run has the releases' own loss, whose
critic is drawn; nothing of it is asked for to encode and decode, and no likelihood is claimed. A pipeline's factors of
the latents are the moments of the run, so that `encode` gives what the pipeline's denoiser reads.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from vlm_jax.data import Image, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder, vqvae
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.quantize import Learned
from vlm_jax.pretrained.layout import Entry, Layout
from vlm_jax.pretrained.moments import factors, moments
from vlm_jax.pretrained.pyramids import (
    CONV_IN,
    DIFFUSERS,
    attentive,
    block_types,
    heights,
    levels_of,
    pointwise,
    pyramid_entries,
)
from vlm_jax.pretrained.settings import expects, require
from vlm_jax.pretrained.source import CONFIG, Source
from vlm_jax.pretrained.tensors import computed_in
from vlm_jax.records import to_json

KL, VQ = "AutoencoderKL", "VQModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
}
USUAL = {
    KL: {**SHARED, "latent_channels": 4, "scaling_factor": 0.18215},
    VQ: {**SHARED, "latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None},
}
"""What a setting is that config.json leaves out (diffusers' classes)."""
ONLY = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "norm_type": "group",
}
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
MARK = "Attn"
"""With what the type of a block with attention begins."""
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What older files call them -> what newer ones do."""
FRESH = (r"^objective/", r"^log_scale$")
"""The parameters of a loss: who looks at copies, and the scales of pixels."""


def newer(key: str) -> str:
    return re.sub(r"\.(query|key|value|proj_attn)\.", lambda found: f".{ATTENTION[found[1]]}.", key)


def where_of(source: Source) -> str:
    return str(source.directory / CONFIG)


def told_by(source: Source, kind: str) -> dict[str, Any]:
    """The settings, with what is left out; raises a `UserError` that names one which cannot be expressed."""
    told, where = source.config, where_of(source)
    if told.get("_class_name") != kind:
        found = told.get("_class_name")
        raise UserError(
            f"_class_name in {where} is {found!r}: bring the config.json of the weights, which are {kind}'s"
        )
    expects(told, ONLY, where)
    told = {**USUAL[kind], **told}
    if told["in_channels"] != told["out_channels"]:
        raise UserError(f"out_channels in {where} is {told['out_channels']}: it must be in_channels, an image's")
    return told


def config_of(source: Source, kind: str, build: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Any:
    """The `Config` that settings tell.

    Args:
      build: of the settings, and of the arguments that both families have.

    Raises:
      UserError: there are none, or one cannot be expressed, which is named.
    """
    told, where = told_by(source, kind), where_of(source)
    levels, size = levels_of(told, where, (DOWN, UP), MARK), told["sample_size"]
    if not isinstance(size, int):
        raise UserError(f"sample_size in {where} is {size!r}: it must be a number of pixels, of height and width")
    try:
        network = Pyramid(
            widths=tuple(told["block_out_channels"]),
            blocks=told["layers_per_block"],
            attention=heights(levels, size),
            groups=told["norm_num_groups"],
            dtype=computed_in(source.tensors, CONV_IN),
        )
        shared = {"image_size": size, "channels": told["in_channels"], "network": network}
        found = build(told, {**shared, "objective": Adversarial()})
        to_json(found)  # refuses what is not of the declared types
    except (TypeError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{where} does not hold the settings of an autoencoder ({error})") from error
    return found


def kl_config(source: Source) -> autoencoder.Config:
    return config_of(source, KL, lambda told, shared: autoencoder.Config(**shared, latent=told["latent_channels"]))


def vq_config(source: Source) -> vqvae.Config:
    """Its `scaling_factor` is of the features and no matter of codes."""

    def build(told: dict[str, Any], shared: dict[str, Any]) -> vqvae.Config:
        width = told["vq_embed_dim"] or told["latent_channels"]
        codes = Learned(size=told["num_vq_embeddings"], width=width)
        return vqvae.Config(**shared, hidden=told["latent_channels"], quantizer=codes)

    return config_of(source, VQ, build)


def kl_entries(config: autoencoder.Config) -> Iterator[Entry]:
    yield from pyramid_entries(config.network, config.image_size, DIFFUSERS)
    yield from projections("posterior", "latent")


def vq_entries(config: vqvae.Config) -> Iterator[Entry]:
    yield from pyramid_entries(config.network, config.image_size, DIFFUSERS)
    yield from projections("features", "latent")
    yield codes_entry()


def projections(after: str, before: str) -> Iterator[Entry]:
    """Of what the encoder gives, and of what the decoder reads."""
    yield from pointwise(after, "quant_conv")
    yield from pointwise(before, "post_quant_conv")


def codes_entry() -> Entry:
    return Entry("quantizer/vectors", "quantize.embedding.weight")


def told_of(config: autoencoder.Config | vqvae.Config, kind: str) -> dict[str, Any]:
    """The inverse of `config_of`, but for what is one family's."""
    require({"levels": (config.levels, 256)}, kind)
    network, size = config.network, config.image_size
    levels, count = attentive(network, size), len(network.widths)
    return {
        "_class_name": kind,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "down_block_types": block_types(DOWN, MARK, levels, count),
        "up_block_types": block_types(UP, MARK, levels, count)[::-1],
        "block_out_channels": list(network.widths),
        "layers_per_block": network.blocks,
        "act_fn": "silu",
        "norm_num_groups": network.groups,
        "sample_size": size,
    }


def check_codes(config: vqvae.Config, *, unit: bool, whose: str) -> None:
    """Refuses a quantiser that a layout has not."""
    require({"quantizer": (type(config.quantizer).__name__, Learned.__name__)}, whose)
    require({"quantizer.unit": (getattr(config.quantizer, "unit", unit), unit)}, whose)


def kl_export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    return {CONFIG: kl_told(experiment.model)}


def kl_told(config: autoencoder.Config) -> dict[str, Any]:
    """The inverse of `kl_config`."""
    return {**told_of(config, KL), "latent_channels": config.latent}


def vq_export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    config: vqvae.Config = experiment.model
    check_codes(config, unit=False, whose=VQ)
    codes = {"num_vq_embeddings": config.quantizer.size, "vq_embed_dim": config.quantizer.width}
    return {CONFIG: {**told_of(config, VQ), "latent_channels": config.hidden, **codes}}


def fields(source: Source) -> tuple[Image, ...]:
    return (Image(),)


def recognises(source: Source) -> bool:
    return "encoder.down_blocks.0.resnets.0.norm1.weight" in source.tensors


LAYOUTS = (
    Layout(
        name="autoencoder_kl",
        family="autoencoder",
        recognises=lambda source: recognises(source) and "quantize.embedding.weight" not in source.tensors,
        config=kl_config,
        entries=kl_entries,
        fields=fields,
        known_as=newer,
        fresh=FRESH,
        collections=lambda source, config: moments({**USUAL[KL], **source.config}, config.latent, where_of(source)),
        told=lambda collections: {CONFIG: factors(collections)},
        export=kl_export,
        weights={"": WEIGHTS},
    ),
    Layout(
        name="vq_model",
        family="vqvae",
        recognises=lambda source: recognises(source) and "quantize.embedding.weight" in source.tensors,
        config=vq_config,
        entries=vq_entries,
        fields=fields,
        known_as=newer,
        fresh=FRESH,
        export=vq_export,
        weights={"": WEIGHTS},
    ),
)
