"""The diffusion transformer of classes (DiT, 2212.09748), as a pipeline of diffusers and by its authors' key names.

`DiTPipeline` is a first stage and a transformer. diffusers departs from the paper's code by two constants that stand in
no file: the frequencies of its times end at 1/10000 itself, and the second norm of a block has an epsilon of 1e-5. The
published weights are the authors', and are computed with here as by them.

The authors' file holds the transformer alone, which becomes a model of real vectors, the prior of no first stage: give
it one by a start into "prior". It has no settings, and its keys are those of SiT, which predicts another thing: it is
read where it is named. Sizes are those of the arrays; heads are those of all that the authors have published.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from vlm_jax.data import Image, Label, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import diffusion, latent_diffusion
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.dit import DiT, position_features
from vlm_jax.nn.transformer import Transformer
from vlm_jax.pretrained import patch_transformers, schedules
from vlm_jax.pretrained.denoisers import below, settled, side_of, time_entries
from vlm_jax.pretrained.first_stages import WEIGHTS
from vlm_jax.pretrained.hf_towers import mlp_entries
from vlm_jax.pretrained.layout import Entry, Layout, linear
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
    VAE,
    check_parts,
    check_prior,
    first_entries,
    first_stage,
    first_told,
    index_of,
    pipeline_layout,
)
from vlm_jax.pretrained.settings import known, require
from vlm_jax.pretrained.source import CONFIG, Source
from vlm_jax.pretrained.tensors import computed_in

PIPE, KIND = "DiTPipeline", "DiTTransformer2DModel"
PART = "transformer/"
PARTS = {"vae": "AutoencoderKL", "transformer": KIND, "scheduler": "DDIMScheduler"}
USUAL = patch_transformers.USUAL | {"out_channels": None, "sample_size": 32, "norm_eps": 1e-5}
ONLY = patch_transformers.ONLY | {"norm_type": "ada_norm_zero"}
ELSEWHERE = patch_transformers.ELSEWHERE | {"cross_attention_dim": None, "caption_channels": None}
EPSILONS = (1e-5, EPS)
"""What diffusers has for want of another setting, and what the authors have."""
SAMPLING = diffusion.Sampling(solver="ddim", steps=50, guidance=4.0)
"""Steps and guidance of the pipeline where it is told none."""
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""By the width, of DiT-S, B, L and XL (table 1)."""


def config(source: Source) -> latent_diffusion.Config:
    check_parts(source, PIPE, tuple(PARTS), ("id2label",))
    part = source.part("transformer")
    where = str(part.path / CONFIG)
    check_class(part.config, KIND, where)
    told = known(part.config, USUAL, ONLY | ELSEWHERE, patch_transformers.IDLE, where)
    if told["norm_eps"] not in EPSILONS:
        raise UserError(f"norm_eps in {where} is {told['norm_eps']!r}, which the model cannot express: {EPS} is")
    side, chain = side_of(told["sample_size"], where), schedules.chain(source)
    chain["variance"] = variance_of(told, chain["variance"], where)

    def prior() -> diffusion.Config:
        backbone = DiT(patch_size=told["patch_size"], transformer=stack_of(told, part.tensors))
        network = Network(backbone=backbone, classes=told["num_embeds_ada_norm"])
        return diffusion.Config(image_size=side, channels=told["in_channels"], levels=None, network=network, **chain)

    return latent_diffusion.Config(first=first_stage(source, side), prior=settled(prior, where))


def conditioning_entries(key: str) -> Iterator[Entry]:
    """Of a time and a class."""
    times = f"{key}.timestep_embedder"
    yield from time_entries("conditioning", f"{times}.linear_1", f"{times}.linear_2")
    yield Entry("conditioning/label", f"{key}.class_embedder.embedding_table.weight")


def network_entries(config: diffusion.Config) -> Iterator[Entry]:
    """The table of a transformer, of whose blocks each has a copy of what makes a vector of time and class."""
    backbone: Any = config.network.backbone
    yield from patches_entries(patch_transformers.PATCHES, backbone.patch_size, config.channels)
    for i in range(backbone.transformer.depth):
        block = f"transformer_blocks.{i}"
        for entry in conditioning_entries(f"{block}.norm1.emb"):
            yield replace(entry, copies=i > 0)
        yield from linear(f"block_{i}/modulation", f"{block}.norm1.linear")
        yield from block_entries(f"block_{i}", block)
    yield from linear("last_modulation", "proj_out_1")
    yield from linear("last", "proj_out_2")


def entries(config: latent_diffusion.Config) -> Iterator[Entry]:
    prior: Any = config.prior
    yield from first_entries(config)
    yield from below(PRIOR, PART, network_entries(prior))


def check_expressible(config: diffusion.Config, prior: str, whose: str) -> None:
    """Refuses a prior that tells no class, or a text."""
    require({f"{prior}text": (config.text, None)}, whose)
    if config.network.classes is None:
        raise UserError(f"{prior}network.classes is None and {whose} is told a class: the model stays a run")


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    config: latent_diffusion.Config = experiment.model
    prior: Any = config.prior
    check_prior(config, DiT, PIPE)
    check_expressible(prior, "prior.", PIPE)
    chain = schedules.told_of(prior)
    told = patch_transformers.told_of(prior, PIPE) | {
        "_class_name": KIND,
        "norm_type": "ada_norm_zero",
        "num_embeds_ada_norm": prior.network.classes,
    }
    parts = index_of(PIPE, PARTS | {"scheduler": chain["_class_name"]})
    return {**parts, **first_told(config), PART + CONFIG: told, schedules.FILE: chain}


def original_config(source: Source) -> diffusion.Config:
    """Raises a `UserError` where sizes cannot be made out."""
    tensors, first = source.tensors, "x_embedder.proj.weight"
    if len(tensors.shape(first)) != 4:
        raise UserError(f"{first} in {source.path} is {list(tensors.shape(first))}: it must be a convolution's")
    width, channels, patch, _ = tensors.shape(first)
    if width not in HEADS:
        raise UserError(f"{source.path} is of width {width}, and the authors' are {', '.join(map(str, HEADS))}")
    layers = {int(found[1]) for key in tensors if (found := re.match(r"blocks\.(\d+)\.", key))}
    transformer = Transformer(
        width=width,
        depth=len(layers),
        heads=HEADS[width],
        mlp=tensors.shape("blocks.0.mlp.fc1.weight")[0],
        activation="gelu_tanh",
        norm_eps=EPS,
        dtype=computed_in(tensors, first),
    )
    classes = tensors.shape("y_embedder.embedding_table.weight")[0] - 1
    learned = tensors.shape("final_layer.linear.weight")[0] == 2 * patch * patch * channels
    return settled(
        lambda: diffusion.Config(
            image_size=math.isqrt(tensors.shape("pos_embed")[1]) * patch,
            channels=channels,
            levels=None,
            network=Network(backbone=DiT(patch_size=patch, transformer=transformer), classes=classes),
            variance="learned" if learned else "forward",  # as the release's `create_diffusion`
        ),
        str(source.path),
    )


def original_entries(config: diffusion.Config) -> Iterator[Entry]:
    backbone: Any = config.network.backbone
    yield from time_entries("backbone/conditioning", "t_embedder.mlp.0", "t_embedder.mlp.2")
    yield Entry("backbone/conditioning/label", "y_embedder.embedding_table.weight")
    yield from below("backbone/", "", patches_entries("x_embedder.proj", backbone.patch_size, config.channels))
    for i in range(backbone.transformer.depth):
        path, block = f"backbone/block_{i}", f"blocks.{i}"
        yield from linear(f"{path}/modulation", f"{block}.adaLN_modulation.1")
        for j, name in enumerate(("query", "key", "value")):
            yield from linear(f"{path}/attention/{name}", f"{block}.attn.qkv", part=(j, 3))
        yield from linear(f"{path}/attention/out", f"{block}.attn.proj")
        yield from mlp_entries(f"{path}/mlp", f"{block}.mlp")
    yield from linear("backbone/last_modulation", "final_layer.adaLN_modulation.1")
    yield from linear("backbone/last", "final_layer.linear")


def positions(config: diffusion.Config) -> dict[str, np.ndarray]:
    """What is added to patches by their places, which is not learned."""
    backbone: Any = config.network.backbone
    features = position_features(config.image_size // backbone.patch_size, backbone.transformer.width)
    return {"pos_embed": np.asarray(features)[None]}


def original_export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    config: diffusion.Config = experiment.model
    whose = "DiT"
    require({"network.backbone": (type(config.network.backbone).__name__, whose)}, whose)
    check_expressible(config, "", whose)
    t: Any = config.network.backbone.transformer  # type: ignore[union-attr]
    settings: dict[str, tuple[Any, Any]] = {
        "levels": (config.levels, None),
        "timesteps": (config.timesteps, 1000),
        "betas": (config.betas, "linear"),
        "zero_terminal": (config.zero_terminal, False),
        "predict": (config.predict, "eps"),
        "variance": (config.variance, "learned" if config.variance == "learned" else "forward"),
        "network.backbone.transformer.heads": (t.heads, HEADS.get(t.width)),
        "network.backbone.transformer.activation": (t.activation, "gelu_tanh"),
        "network.backbone.transformer.norm_eps": (t.norm_eps, EPS),
    }
    require(settings, whose)
    return {}


LAYOUTS = (
    pipeline_layout(
        "dit",
        PIPE,
        config=config,
        entries=entries,
        fields=lambda source: (Image(), Label()),
        sampling=lambda config: SAMPLING,
        export=export,
        weights={VAE: WEIGHTS, PART: WEIGHTS},
    ),
    Layout(
        name="dit-original",
        family="diffusion",
        recognises=lambda source: False,
        config=original_config,
        entries=original_entries,
        fields=lambda source: (Image(), Label()),
        sampling=lambda config: SAMPLING,
        fixed=positions,
        export=original_export,
    ),
)
