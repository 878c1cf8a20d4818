"""CLIP in safetensors, as Hugging Face keeps it: `CLIPModel` of OpenAI's and LAION's weights (transformers 4 and 5)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vlm_jax.data import Caption, Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import clip
from vlm_jax.nn.text import TextTransformer
from vlm_jax.pretrained.hf_towers import (
    IDLE,
    text_config,
    text_entries,
    told_of,
    told_of_part,
    usual,
    vision_config,
    vision_entries,
)
from vlm_jax.pretrained.images import Pixels, cropping, pixels, processor
from vlm_jax.pretrained.layout import Entry, Layout, linear
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import Source

KEY = "vision_model.pre_layrnorm.weight"  # sic
PREPROCESSOR = "preprocessor_config.json"


def shown(source: Source) -> Pixels:
    """What the processor does to images."""
    size = usual(told_of_part(source.config, "vision_config"), "clip_vision_model")["image_size"]
    return pixels(source.beside(PREPROCESSOR), cropping(size), size, str(source.directory / PREPROCESSOR))


def config(source: Source) -> clip.Config:
    told, where = source.config, str(source.directory / "config.json")
    if told.get("model_type") != "clip":
        raise UserError(f"model_type in {where} is {told.get('model_type')!r}: give a whole CLIP, which has two towers")
    text, dtype = told_of_part(told, "text_config"), source.tensors.dtype("logit_scale")
    projection = told.get("projection_dim", 512)
    return clip.Config(
        image=vision_config(
            told_of_part(told, "vision_config"), "clip_vision_model", shown(source), dtype=dtype, where=where
        ),
        text=text_config(text, "clip_text_model", end_id(text, where), dtype=dtype, where=where),
        embedding=projection,
    )


def end_id(told: dict[str, Any], where: str) -> int:
    """The token at which a text is read.

    Old settings say 2, which is not meant: transformers then reads a text at its highest id, which is the end token,
    the last of CLIP's vocabulary.
    """
    told = usual(told, "clip_text_model")
    found = told["eos_token_id"]
    if not isinstance(found, int):
        raise UserError(f"eos_token_id in {where} is {found}: a text is read at one token")
    return told["vocab_size"] - 1 if found == 2 else found


def end_told(text: TextTransformer) -> int:
    """The inverse; raises a `UserError` where a 2 that is meant would not be taken for itself."""
    if text.eos_id == 2 and text.vocab_size != 3:
        raise UserError("text.eos_id is 2, which CLIP's layouts have for the highest id: the model stays a run")
    return text.eos_id


def entries(config: clip.Config) -> Iterator[Entry]:
    yield from vision_entries(config.image, "image/", "vision_model.")
    yield from linear("image_projection", "visual_projection", bias=False)
    yield from text_entries(config.text, "text/", "text_model.")
    yield from linear("text/projection", "text_projection", bias=False)
    yield Entry("log_scale", "logit_scale", lambda theirs: theirs.reshape(()), np.asarray)


def fields(source: Source) -> tuple[Field, ...]:
    return (shown(source).image, Caption())


def check_expressible(config: clip.Config) -> None:
    """Refuses what OpenAI's architecture is not, by the setting's name."""
    image, text = config.image, config.text
    settings = {
        "objective": (config.objective, "info_nce"),
        "projection": (config.projection, True),
        "image.pool": (image.pool, "class"),
        "image.pre_norm": (image.pre_norm, True),
        "image.patch_bias": (image.patch_bias, False),
        "text.pool": (text.pool, "eos"),
    }
    require(settings, "CLIP")


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    model = experiment.model
    check_expressible(model)
    text = told_of(model.text, "clip_text_model") | {"eos_token_id": end_told(model.text)}
    if tokenizer is not None:
        text |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    return {
        "config.json": {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": model.embedding,
            "logit_scale_init_value": 2.6592,
            "text_config": text | {"projection_dim": model.embedding},
            "vision_config": told_of(model.image, "clip_vision_model") | {"projection_dim": model.embedding},
            "torch_dtype": experiment.frozen_dtype or "float32",
        },
        PREPROCESSOR: processor(experiment, model.image, "CLIPImageProcessor"),
    }


LAYOUT = Layout(
    name="clip",
    family="clip",
    recognises=lambda source: KEY in source.tensors,
    config=config,
    entries=entries,
    fields=fields,
    idle=(IDLE,),
    export=export,
)
