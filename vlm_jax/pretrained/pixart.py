"""PixArt-alpha (2310.00426) of 256 or 512 pixels as a pipeline of diffusers: first stage, transformer, T5's encoder.

`PixArtAlphaPipeline`. That of 1024 pixels is told its resolution, too, and is refused. The pipeline reads captions in
small letters, 120 tokens of them, of which padding is not attended to. It goes away from an empty caption, of which
that is the end token alone; older files hold besides the caption that the authors' own code has in place of none,
`caption_projection.y_embedding`, which diffusers has left out since: where it is there it is taken, all of it attended
to, where the authors' code attends to as much of it as the caption beside it has tokens.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tokenizers import normalizers

from vlm_jax.data import Caption, Image, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import diffusion, latent_diffusion, text_encoder
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.pixart import PixArt
from vlm_jax.nn.t5 import T5
from vlm_jax.pretrained import patch_transformers, schedules, t5
from vlm_jax.pretrained.denoisers import attention_entries, below, settled, side_of, time_entries
from vlm_jax.pretrained.first_stages import WEIGHTS
from vlm_jax.pretrained.layout import Entry, linear
from vlm_jax.pretrained.patch_transformers import (
    EPS,
    block_entries,
    check_class,
    patches_entries,
    stack_of,
    variance_of,
)
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
    pipeline_layout,
    tokenizer_of,
)
from vlm_jax.pretrained.settings import known, require
from vlm_jax.pretrained.source import CONFIG, Source

PIPE, KIND = "PixArtAlphaPipeline", "PixArtTransformer2DModel"
PART, ENCODER = "transformer/", "text_encoder/"
PARTS = {
    "vae": "AutoencoderKL",
    "text_encoder": "T5EncoderModel",
    "tokenizer": "PreTrainedTokenizerFast",
    "transformer": KIND,
    "scheduler": "DDIMScheduler",
}
LENGTH = 120
"""Tokens of a caption (section 3.1)."""
USUAL = patch_transformers.USUAL | {
    "out_channels": 8,
    "sample_size": 128,
    "cross_attention_dim": 1152,
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
ONLY = patch_transformers.ONLY | {"norm_type": "ada_norm_single", "norm_eps": EPS}
SAMPLING = diffusion.Sampling(solver="dpm_solver", steps=20, guidance=4.5)
"""Solver, steps and guidance of the pipeline where it is told none."""


def told_by(source: Source) -> dict[str, Any]:
    """The settings of the transformer; raises a `UserError` that names one which cannot be expressed."""
    where = str(source.path / CONFIG)
    check_class(source.config, KIND, where)
    told = known(source.config, USUAL, ONLY | patch_transformers.ELSEWHERE, patch_transformers.IDLE, where)
    side = side_of(told["sample_size"], where)
    # What diffusers has where these are told nothing of, which follows from the size.
    for name, follows, only in (
        ("use_additional_conditions", side == 128, False),
        ("interpolation_scale", max(side // 64, 1), 1),
    ):
        if (found := follows if told[name] is None else told[name]) != only:
            raise UserError(f"{name} in {where} is {found}, of latents of {side}: the model can express {only} alone")
    return told


def config(source: Source) -> latent_diffusion.Config:
    check_parts(source, PIPE, tuple(PARTS))
    part, encoder = source.part("transformer"), source.part("text_encoder")
    told, where = told_by(part), str(part.path / CONFIG)
    dtype = encoder.tensors.dtype(t5.TABLE)
    reader = replace(t5.t5_config(encoder.config, dtype=dtype, where=str(encoder.path / CONFIG)), context_length=LENGTH)
    first, chain = first_stage(source, told["sample_size"]), schedules.chain(source)
    chain["variance"] = variance_of(told, chain["variance"], where)

    def prior() -> diffusion.Config:
        stack = stack_of(told, part.tensors)
        for name, only in (("cross_attention_dim", stack.width), ("caption_channels", reader.width)):
            if told[name] != only:
                raise UserError(f"{name} is {told[name]} and must be {only}, as wide as what it is of")
        return diffusion.Config(
            image_size=told["sample_size"],
            channels=told["in_channels"],
            levels=None,
            network=Network(backbone=PixArt(patch_size=told["patch_size"], transformer=stack)),
            text=text_encoder.Config(network=reader),
            **chain,
        )

    return latent_diffusion.Config(first=first, prior=settled(prior, where))


def network_entries(config: diffusion.Config) -> Iterator[Entry]:
    """The table of the transformer."""
    backbone: Any = config.network.backbone
    times = "adaln_single.emb.timestep_embedder"
    yield from time_entries("conditioning", f"{times}.linear_1", f"{times}.linear_2")
    yield from linear("modulation", "adaln_single.linear")
    yield from patches_entries(patch_transformers.PATCHES, backbone.patch_size, config.channels)
    for ours, theirs in (("up", "linear_1"), ("down", "linear_2")):
        yield from linear(f"text/{ours}", f"caption_projection.{theirs}")
    for i in range(backbone.transformer.depth):
        block = f"transformer_blocks.{i}"
        yield Entry(f"block_{i}/modulation/table", f"{block}.scale_shift_table")
        yield from attention_entries(f"block_{i}/reading", f"{block}.attn2", bias=True)
        yield from block_entries(f"block_{i}", block)
    yield Entry("last_modulation/table", "scale_shift_table")
    yield from linear("last", "proj_out")


def entries(config: latent_diffusion.Config) -> Iterator[Entry]:
    prior: Any = config.prior
    yield from first_entries(config)
    yield from below(PRIOR, PART, network_entries(prior))
    yield Entry(UNTOLD, f"{PART}caption_projection.y_embedding")
    yield from below("", ENCODER, t5.t5_entries(prior.text.network, f"{TEXT}network/"))


def tokenizer(source: Source) -> Tokenizer:
    """That of the directory, which reads capitals as small letters."""
    found = tokenizer_of(source)
    inner = type(found.tokenizer).from_str(found.tokenizer.to_str())
    small, own = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()]), inner.normalizer
    if own is None or not str(own).startswith(str(small)[:-2]):  # of one that was written here it is so
        inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), *([own] if own else [])])
    inner.encode_special_tokens = True
    return replace(found, tokenizer=inner)


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    config: latent_diffusion.Config = experiment.model
    prior: Any = config.prior
    check_prior(config, PixArt, PIPE)
    encoder = getattr(prior.text, "network", None)
    require({"prior.text.network": (type(encoder).__name__, T5.__name__)}, PIPE)
    assert isinstance(encoder, T5)
    require({"prior.text.network.context_length": (encoder.context_length, LENGTH)}, PIPE)
    require({"prior.network.classes": (prior.network.classes, None)}, PIPE)
    chain = schedules.told_of(prior)
    told = patch_transformers.told_of(prior, PIPE) | {
        "_class_name": KIND,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "cross_attention_dim": prior.network.backbone.transformer.width,
        "caption_channels": encoder.width,
        "interpolation_scale": 1,
        "use_additional_conditions": False,
    }
    text = t5.export(replace(experiment, model=prior.text), tokenizer)
    return {
        **index_of(PIPE, PARTS | {"scheduler": chain["_class_name"]}),
        **first_told(config),
        PART + CONFIG: told,
        schedules.FILE: chain,
        **{ENCODER + name: settings for name, settings in text.items()},
    }


LAYOUT = pipeline_layout(
    "pixart",
    PIPE,
    config=config,
    entries=entries,
    fields=lambda source: (Image(), Caption()),
    sampling=lambda config: SAMPLING,
    tokenizer=tokenizer,
    idle=(rf"{ENCODER}decoder\..*", rf"{ENCODER}lm_head\.weight"),
    derived={UNTOLD: empty_caption},
    export=export,
    weights={VAE: WEIGHTS, PART: WEIGHTS, ENCODER: "model.safetensors"},
    tokenizer_directory="tokenizer/",
)
