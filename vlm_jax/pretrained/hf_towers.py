"""The towers of CLIP and SigLIP as Hugging Face keeps them (transformers 4 and 5): settings and tables, in and out.

The functions take a part's settings and the prefixes of its keys, for models that hold such a tower as a part.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.pretrained.images import Pixels
from vlm_jax.pretrained.layout import Entry, linear, norm
from vlm_jax.pretrained.tensors import BFLOAT16
from vlm_jax.records import to_json

Told = Mapping[str, Any]

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
"""Theirs -> ours."""
SIZES = {"num_hidden_layers": 12, "attention_dropout": 0.0}
CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **SIZES}
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, **SIZES}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SEEING = {**BASE, "num_channels": 3, "image_size": 224}
USUAL: dict[str, dict[str, Any]] = {
    "clip_vision_model": {**CLIP, **SEEING, "patch_size": 32},
    "clip_text_model": {
        **CLIP,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "vocab_size": 49_408,
        "max_position_embeddings": 77,
        "eos_token_id": 49_407,
    },
    "siglip_vision_model": {**SIGLIP, **SEEING, "patch_size": 16, "vision_use_head": True},
    "siglip_text_model": {**SIGLIP, **BASE, "vocab_size": 32_000, "max_position_embeddings": 64},
}
"""By the kind of tower, what a setting is that config.json leaves out (transformers' configuration classes)."""
IDLE = r"(.*\.)?embeddings\.position_ids"
"""The places 0, 1, ... that older versions saved."""


def told_of_part(config: Told, name: str) -> dict[str, Any]:
    """Of a whole model's `config.json` what it says of a part, `vision_config` or `text_config`.

    Some old ones say it twice, and what stands in `..._dict` is what transformers goes by.
    """
    return dict(config.get(f"{name}_dict") or config.get(name) or {})


def transformer(told: Told, dtype: np.dtype[Any], where: str) -> Transformer:
    """The stack of a tower; raises a `UserError` that names a setting which it cannot express."""
    if told["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"hidden_act in {where} is {told['hidden_act']!r}: there are {', '.join(ACTIVATIONS)}")
    if told["attention_dropout"]:
        raise UserError(f"attention_dropout in {where} is {told['attention_dropout']}, which no attention has here")
    return Transformer(
        width=told["hidden_size"],
        depth=told["num_hidden_layers"],
        heads=told["num_attention_heads"],
        mlp=told["intermediate_size"],
        activation=ACTIVATIONS[told["hidden_act"]],  # type: ignore[arg-type]
        norm_eps=told["layer_norm_eps"],
        dtype="bfloat16" if dtype == BFLOAT16 else "float32",
    )


def usual(told: Told, kind: str) -> dict[str, Any]:
    return {**USUAL[kind], **told}


def vision_config(
    told: Told, kind: str, pixels: Pixels, *, dtype: np.dtype[Any], where: str, features: int = 0
) -> VisionTransformer:
    """The image tower that a `vision_config` tells.

    Args:
      told: nothing of it may be left out that is not usual.
      kind: clip_vision_model or siglip_vision_model.
      pixels: what its processor does.
      dtype: of the published weights; of bfloat16 ones the model computes in bfloat16, else in float32.
      where: the file, for messages.

    Raises:
      UserError: it has a setting that the tower cannot express, which is named.
    """
    told = usual(told, kind)
    if not told.get("vision_use_head", True):
        raise UserError(f"vision_use_head in {where} is False: a tower without pooling is no part of a pair")
    clip = kind == "clip_vision_model"
    try:
        config = VisionTransformer(
            image_size=told["image_size"],
            patch_size=told["patch_size"],
            channels=told["num_channels"],
            pool="class" if clip else "attention",
            pre_norm=clip,
            patch_bias=not clip,
            mean=pixels.mean,
            std=pixels.std,
            features=features,
            transformer=transformer(told, dtype, where),
        )
        to_json(config)  # refuses what is not of the declared types
    except (TypeError, UserError) as error:
        raise UserError(f"{where} does not hold the settings of an image tower ({error})") from error
    return config


def text_config(told: Told, kind: str, eos_id: int, *, dtype: np.dtype[Any], where: str) -> TextTransformer:
    """The text tower that a `text_config` tells; raises as `vision_config`."""
    told = usual(told, kind)
    try:
        config = TextTransformer(
            vocab_size=told["vocab_size"],
            context_length=told["max_position_embeddings"],
            eos_id=eos_id,
            pool="eos" if kind == "clip_text_model" else "last",
            transformer=transformer(told, dtype, where),
        )
        to_json(config)
    except (TypeError, UserError) as error:
        raise UserError(f"{where} does not hold the settings of a text tower ({error})") from error
    return config


def told_of(config: VisionTransformer | TextTransformer, kind: str) -> dict[str, Any]:
    """The inverse: a `vision_config` or a `text_config`."""
    t = config.transformer
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    told: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": t.width,
        "intermediate_size": t.mlp,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "hidden_act": theirs[t.activation],
        "layer_norm_eps": t.norm_eps,
        "attention_dropout": 0.0,
    }
    if isinstance(config, VisionTransformer):
        sizes = {"image_size": config.image_size, "patch_size": config.patch_size, "num_channels": config.channels}
        return {**told, **sizes}
    return {**told, "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length}


def patch_entry(path: str, key: str, size: int, channels: int) -> Entry:
    """The kernel of a strided convolution [D, C, size, size] as that of a product with flattened patches."""

    def read(theirs: np.ndarray) -> np.ndarray:
        return theirs.transpose(2, 3, 1, 0).reshape(size * size * channels, -1)

    def write(ours: np.ndarray) -> np.ndarray:
        return ours.reshape(size, size, channels, -1).transpose(3, 2, 0, 1)

    return Entry(path, key, read, write)


def row_entry(path: str, key: str, axes: int = 1) -> Entry:
    """What is theirs without the `axes` leading axes of one that ours has."""
    ones = (1,) * axes
    return Entry(path, key, lambda theirs: theirs.reshape(*ones, *theirs.shape), lambda ours: ours[(0,) * axes])


def block_entries(path: str, key: str) -> Iterator[Entry]:
    """A layer of either tower."""
    yield from norm(f"{path}/attention_norm", f"{key}.layer_norm1")
    for name, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
        yield from linear(f"{path}/attention/{name}", f"{key}.self_attn.{theirs}")
    yield from norm(f"{path}/mlp_norm", f"{key}.layer_norm2")
    yield from mlp_entries(f"{path}/mlp", f"{key}.mlp")


def mlp_entries(path: str, key: str) -> Iterator[Entry]:
    yield from linear(f"{path}/up", f"{key}.fc1")
    yield from linear(f"{path}/down", f"{key}.fc2")


def fused_entries(path: str, key: str) -> Iterator[Entry]:
    """Queries, keys and values in one matrix, as `torch.nn.MultiheadAttention` has them."""
    for i, name in enumerate(("query", "key", "value")):
        yield Entry(f"{path}/{name}/kernel", f"{key}.in_proj_weight", np.transpose, np.transpose, (i, 3))
        yield Entry(f"{path}/{name}/bias", f"{key}.in_proj_bias", part=(i, 3))
    yield from linear(f"{path}/out", f"{key}.out_proj")


def vision_entries(config: VisionTransformer, ours: str, theirs: str) -> Iterator[Entry]:
    """The table of an image tower.

    Args:
      ours: the path of the tower among our parameters, such as "image/".
      theirs: what its keys begin with, such as "vision_model.".
    """
    yield patch_entry(
        f"{ours}patch/kernel", f"{theirs}embeddings.patch_embedding.weight", config.patch_size, config.channels
    )
    if config.patch_bias:
        yield Entry(f"{ours}patch/bias", f"{theirs}embeddings.patch_embedding.bias")
    yield row_entry(f"{ours}position", f"{theirs}embeddings.position_embedding.weight")
    if config.pool == "class":
        yield row_entry(f"{ours}class_token", f"{theirs}embeddings.class_embedding", 2)
    if config.pre_norm:
        yield from norm(f"{ours}pre_norm", f"{theirs}pre_layrnorm")
    for i in range(config.transformer.depth):
        yield from block_entries(f"{ours}transformer/block_{i}", f"{theirs}encoder.layers.{i}")
    yield from norm(f"{ours}transformer/final_norm", f"{theirs}post_layernorm")
    if config.pool == "attention":
        yield Entry(f"{ours}pool/probe", f"{theirs}head.probe")
        yield from fused_entries(f"{ours}pool/attention", f"{theirs}head.attention")
        yield from norm(f"{ours}pool/mlp_norm", f"{theirs}head.layernorm")
        yield from mlp_entries(f"{ours}pool/mlp", f"{theirs}head.mlp")


def text_entries(config: TextTransformer, ours: str, theirs: str) -> Iterator[Entry]:
    """The table of a text tower, but for its projection; `ours` and `theirs` as of `vision_entries`."""
    yield Entry(f"{ours}token/embedding", f"{theirs}embeddings.token_embedding.weight")
    yield row_entry(f"{ours}position", f"{theirs}embeddings.position_embedding.weight")
    for i in range(config.transformer.depth):
        yield from block_entries(f"{ours}transformer/block_{i}", f"{theirs}encoder.layers.{i}")
    yield from norm(f"{ours}transformer/final_norm", f"{theirs}final_layer_norm")
