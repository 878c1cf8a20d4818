"""CLIP by OpenAI's own key names in a safetensors file, which has no settings beside it.

The sizes are those of the arrays; that heads have 64 features, and the GELU is the quick one, is so of all that OpenAI
has published. Weights of others under these names say so in an `open_clip_config.json`.
"""

import math
import re
from typing import Any

from vlm_jax.data import Caption, Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import clip
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.pretrained.images import OPENAI_MEAN, OPENAI_STD, cropping, pixels, processor
from vlm_jax.pretrained.layout import Layout
from vlm_jax.pretrained.open_clip import EPS, check_openai, entries
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import Source
from vlm_jax.pretrained.tensors import BFLOAT16

SIGNS = ("input_resolution", "context_length", "vocab_size")
"""Three numbers that OpenAI's files have among the weights, and others' of these names have not."""
HEAD = 64


def stack(source: Source, key: str, width: int) -> Transformer:
    """The tower whose layers' keys begin so."""
    layers = {int(found[1]) for name in source.tensors if (found := re.match(rf"{re.escape(key)}(\d+)\.", name))}
    up = f"{key}0.mlp.c_fc.weight"
    if up not in source.tensors:
        raise UserError(f"{source.path} lacks {up}: CLIP's ResNets and parts of a model cannot be read")
    return Transformer(
        width=width,
        depth=len(layers),
        heads=max(1, width // HEAD),
        mlp=source.tensors.shape(up)[0],
        activation="quick_gelu",
        norm_eps=EPS,
        dtype="bfloat16" if source.tensors.dtype(up) == BFLOAT16 else "float32",
    )


def config(source: Source) -> clip.Config:
    tensors = source.tensors
    for key in ("visual.conv1.weight", "visual.proj", "token_embedding.weight", "text_projection"):
        if key not in tensors:
            raise UserError(f"{source.path} lacks {key}, by which the size of a CLIP of OpenAI's is known")
    width, channels, patch, _ = tensors.shape("visual.conv1.weight")
    vocab_size, text_width = tensors.shape("token_embedding.weight")
    image = stack(source, "visual.transformer.resblocks.", width)
    return clip.Config(
        image=VisionTransformer(
            image_size=math.isqrt(tensors.shape("visual.positional_embedding")[0] - 1) * patch,
            patch_size=patch,
            channels=channels,
            pre_norm=True,
            patch_bias=False,
            mean=OPENAI_MEAN,
            std=OPENAI_STD,
            transformer=image,
        ),
        text=TextTransformer(
            vocab_size=vocab_size,
            context_length=tensors.shape("positional_embedding")[0],
            eos_id=vocab_size - 1,
            transformer=stack(source, "transformer.resblocks.", text_width),
        ),
        embedding=tensors.shape("text_projection")[1],
    )


def fields(source: Source) -> tuple[Field, ...]:
    size = config(source).image.image_size
    return (pixels({}, cropping(size), size, str(source.path)).image, Caption())


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    model = experiment.model
    check_openai(model)
    does = processor(experiment, model.image, "CLIPImageProcessor")
    image, text = model.image.transformer, model.text.transformer
    settings = {
        "image.transformer.activation": (image.activation, "quick_gelu"),
        "image.transformer.heads": (image.heads, max(1, image.width // HEAD)),
        "text.transformer.heads": (text.heads, max(1, text.width // HEAD)),
        "image.mean": (model.image.mean, OPENAI_MEAN),
        "image.std": (model.image.std, OPENAI_STD),
        "data.fields.resize": ("crop" if does["do_center_crop"] else "squash", "crop"),
        "data.fields.method": (does["resample"], 3),
    }
    require(settings, "OpenAI")
    return {}


LAYOUT = Layout(
    name="openai-clip",
    family="clip",
    recognises=lambda source: "visual.conv1.weight" in source.tensors and set(SIGNS) <= set(source.tensors),
    config=config,
    entries=entries,
    fields=fields,
    idle=SIGNS,
    export=export,
)
