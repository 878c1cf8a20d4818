"""SigLIP and SigLIP 2 of a fixed resolution as big_vision keeps them: npz files of flax's names, without settings.

Older files have layers apart, `encoderblock_0` and so on, newer ones stacked by a scan, `encoderblock` [L, ...]: two
layouts. The sizes are those of the arrays. No reference computes here what such a file does: keys and shapes are those
of big_vision's code, and the arrays mean what they do in Hugging Face's layout of the same weights.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from vlm_jax.data import Caption, Image, Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import clip
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.pretrained.layout import Entry, Layout, Move, same
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.siglip import END, check_expressible, scalar_entry, tokenizer
from vlm_jax.pretrained.source import Source
from vlm_jax.pretrained.tensors import BFLOAT16

IMAGE, TEXT = "params/img/Transformer", "params/txt/Encoder_0"
PATCH = "params/img/embedding/kernel"
EPS = 1e-6
"""Of every norm, as flax has it."""


def stack(source: Source, key: str) -> Transformer:
    """The tower whose layers are there, apart or stacked."""
    tensors, attention = source.tensors, "MultiHeadDotProductAttention_0/query/kernel"
    stacked = f"{key}/encoderblock/{attention}" in tensors
    first = f"{key}/encoderblock{'' if stacked else '_0'}"
    if f"{first}/{attention}" not in tensors:
        raise UserError(f"{source.path} lacks {first}/{attention}: it holds no two towers of SigLIP")
    shape, up = tensors.shape(f"{first}/{attention}"), tensors.shape(f"{first}/MlpBlock_0/Dense_0/kernel")
    layers = {found[1] for name in tensors if (found := re.match(rf"{key}/encoderblock_(\d+)/", name))}
    return Transformer(
        width=shape[-3],
        depth=shape[0] if stacked else len(layers),
        heads=shape[-2],
        mlp=up[-1],
        activation="gelu_tanh",
        norm_eps=EPS,
        dtype="bfloat16" if tensors.dtype(f"{first}/{attention}") == BFLOAT16 else "float32",
    )


def config(source: Source) -> clip.Config:
    tensors = source.tensors
    if len(kernel := tensors.shape(PATCH)) != 4:
        raise UserError(f"{PATCH} in {source.path} is {list(kernel)}, as NaFlex has it: give one of a fixed resolution")
    patch, _, channels, _ = kernel
    vocab_size, _ = tensors.shape("params/txt/Embed_0/embedding")
    return clip.Config(
        objective="sigmoid",
        image=VisionTransformer(
            image_size=math.isqrt(math.prod(tensors.shape("params/img/pos_embedding")[:-1])) * patch,
            patch_size=patch,
            channels=channels,
            pool="attention",
            transformer=stack(source, IMAGE),
        ),
        text=TextTransformer(
            vocab_size=vocab_size,
            context_length=tensors.shape("params/txt/pos_embedding")[-2],
            eos_id=END,
            pool="last",
            transformer=stack(source, TEXT),
        ),
        embedding=tensors.shape("params/txt/head/kernel")[-1],
        projection=False,
    )


def pair(path: str, key: str, names: tuple[str, str] = ("kernel", "bias")) -> Iterator[tuple[str, str, Move, Move]]:
    """Two arrays that flax calls as we do."""
    return ((f"{path}/{name}", f"{key}/{name}", same, same) for name in names)


def attention_moves(path: str, key: str, heads: int) -> Iterator[tuple[str, str, Move, Move]]:
    """Kernels and biases, whose heads are an axis of their own."""

    def flat(theirs: np.ndarray) -> np.ndarray:
        return theirs.reshape(-1)

    for name in ("query", "key", "value"):
        kernel, bias = f"{key}/{name}/kernel", f"{key}/{name}/bias"
        yield (
            f"{path}/{name}/kernel",
            kernel,
            lambda theirs: theirs.reshape(len(theirs), -1),
            lambda ours: ours.reshape(len(ours), heads, -1),
        )
        yield f"{path}/{name}/bias", bias, flat, lambda ours: ours.reshape(heads, -1)
    yield (
        f"{path}/out/kernel",
        f"{key}/out/kernel",
        lambda theirs: theirs.reshape(-1, theirs.shape[-1]),
        lambda ours: ours.reshape(heads, -1, ours.shape[-1]),
    )
    yield f"{path}/out/bias", f"{key}/out/bias", same, same


def block_moves(path: str, key: str, heads: int) -> Iterator[tuple[str, str, Move, Move]]:
    yield from pair(f"{path}/attention_norm", f"{key}/LayerNorm_0", ("scale", "bias"))
    yield from attention_moves(f"{path}/attention", f"{key}/MultiHeadDotProductAttention_0", heads)
    yield from pair(f"{path}/mlp_norm", f"{key}/LayerNorm_1", ("scale", "bias"))
    yield from mlp_moves(f"{path}/mlp", f"{key}/MlpBlock_0")


def mlp_moves(path: str, key: str) -> Iterator[tuple[str, str, Move, Move]]:
    yield from pair(f"{path}/up", f"{key}/Dense_0")
    yield from pair(f"{path}/down", f"{key}/Dense_1")


def read_layer(read: Move, layer: np.ndarray) -> np.ndarray:
    """Of a stack [1, ...] of one layer."""
    return read(layer[0])


def write_layer(write: Move, ours: np.ndarray) -> np.ndarray:
    return write(ours)[None]


def stack_entries(config: Transformer, ours: str, theirs: str, stacked: bool) -> Iterator[Entry]:
    for i in range(config.depth):
        block = f"{theirs}/encoderblock{'' if stacked else f'_{i}'}"
        for path, key, read, write in block_moves(f"{ours}/block_{i}", block, config.heads):
            if stacked:
                yield Entry(path, key, partial(read_layer, read), partial(write_layer, write), (i, config.depth))
            else:
                yield Entry(path, key, read, write)
    for path, key, _, _ in pair(f"{ours}/final_norm", f"{theirs}/encoder_norm", ("scale", "bias")):
        yield Entry(path, key)


def entries(config: clip.Config, *, stacked: bool) -> Iterator[Entry]:
    image, text = config.image, config.text
    size, channels = image.patch_size, image.channels
    yield Entry(
        "image/patch/kernel",
        PATCH,
        lambda theirs: theirs.reshape(size * size * channels, -1),
        lambda ours: ours.reshape(size, size, channels, -1),
    )
    yield Entry("image/patch/bias", "params/img/embedding/bias")
    yield Entry("image/position", "params/img/pos_embedding")
    yield from stack_entries(image.transformer, "image/transformer", IMAGE, stacked)
    head, heads = "params/img/MAPHead_0", image.transformer.heads
    pooling = [
        ("image/pool/probe", f"{head}/probe", same, same),
        *attention_moves("image/pool/attention", f"{head}/MultiHeadDotProductAttention_0", heads),
        *pair("image/pool/mlp_norm", f"{head}/LayerNorm_0", ("scale", "bias")),
        *mlp_moves("image/pool/mlp", f"{head}/MlpBlock_0"),
    ]
    yield from (Entry(*each) for each in pooling)
    yield Entry("text/token/embedding", "params/txt/Embed_0/embedding")
    yield Entry("text/position", "params/txt/pos_embedding")
    yield from stack_entries(text.transformer, "text/transformer", TEXT, stacked)
    yield from (Entry(*each) for each in pair("text/projection", "params/txt/head"))
    yield scalar_entry("log_scale", "params/t")
    yield scalar_entry("logit_bias", "params/b")


def fields(source: Source) -> tuple[Field, ...]:
    """Its images are scaled by TensorFlow, bilinearly: on Pillow that is not the same to the last level."""
    return (Image(resize="squash", method="bilinear"), Caption())


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    model = experiment.model
    check_expressible(model)
    settings: dict[str, tuple[Any, Any]] = {
        "image.mean": (model.image.mean, (0.5,)),
        "image.std": (model.image.std, (0.5,)),
    }
    for name, part in (("image", model.image.transformer), ("text", model.text.transformer)):
        settings[f"{name}.transformer.activation"] = (part.activation, "gelu_tanh")
        settings[f"{name}.transformer.norm_eps"] = (part.norm_eps, EPS)
    require(settings, "big_vision")
    return {}


def layout(name: str, first: str, *, stacked: bool) -> Layout:
    return Layout(
        name=name,
        family="clip",
        recognises=lambda source: PATCH in source.tensors and f"{IMAGE}/{first}/LayerNorm_0/scale" in source.tensors,
        config=config,
        entries=partial(entries, stacked=stacked),
        fields=fields,
        tokenizer=tokenizer,
        export=export,
        weights={"": "model.npz"},
    )


LAYOUTS = (
    layout("big-vision", "encoderblock_0", stacked=False),
    layout("big-vision-scan", "encoderblock", stacked=True),
)
