"""SigLIP and SigLIP 2 of a fixed resolution in safetensors, as Hugging Face keeps them: `SiglipModel`.

A text is read at the last of its places, which are always filled up, in lower case, and ends in an end token however
long it is. SigLIP 2 differs by its tokenizer, Gemma's. NaFlex, which sees images of any proportions, is refused.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers

from vlm_jax.data import Caption, Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import clip
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
from vlm_jax.pretrained.images import Pixels, pixels, processor, squashing
from vlm_jax.pretrained.layout import Entry, Layout, linear
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import Source, tokenizer_beside

KEY = "text_model.head.weight"
PREPROCESSOR = "preprocessor_config.json"
ENGLISH = 32_000
"""Words of the vocabulary of the first SigLIP, whose texts lose their punctuation, too; SigLIP 2's is Gemma's."""
PUNCTUATION = r"[!-/:-@\[-`{-~]"
END = 1
"""The end token of both vocabularies."""


def shown(source: Source) -> Pixels:
    """What the processor does to images."""
    size = usual(told_of_part(source.config, "vision_config"), "siglip_vision_model")["image_size"]
    return pixels(source.beside(PREPROCESSOR), squashing(size), size, str(source.directory / PREPROCESSOR))


def config(source: Source) -> clip.Config:
    told, where = source.config, str(source.directory / "config.json")
    if told.get("model_type") == "siglip2":
        raise UserError(f"model_type in {where} is siglip2, that of NaFlex: give a SigLIP 2 of a fixed resolution")
    if told.get("model_type") != "siglip":
        raise UserError(f"model_type in {where} is {told.get('model_type')!r}: give a whole SigLIP, of two towers")
    text, dtype = usual(told_of_part(told, "text_config"), "siglip_text_model"), source.tensors.dtype("logit_scale")
    image = vision_config(
        told_of_part(told, "vision_config"), "siglip_vision_model", shown(source), dtype=dtype, where=where
    )
    embedding = text.get("projection_size") or text["hidden_size"]
    if embedding != image.transformer.width:
        raise UserError(
            f"projection_size in {where} is {embedding} and the image tower's width {image.transformer.width}: the "
            f"two are compared, and must agree"
        )
    return clip.Config(
        objective="sigmoid",
        image=image,
        text=text_config(text, "siglip_text_model", END, dtype=dtype, where=where),
        embedding=embedding,
        projection=False,
    )


def entries(config: clip.Config) -> Iterator[Entry]:
    yield from vision_entries(config.image, "image/", "vision_model.")
    yield from text_entries(config.text, "text/", "text_model.")
    yield from linear("text/projection", "text_model.head")
    yield scalar_entry("log_scale", "logit_scale")
    yield scalar_entry("logit_bias", "logit_bias")


def scalar_entry(path: str, key: str) -> Entry:
    """A number, which is theirs in an array [1]."""
    return Entry(path, key, lambda theirs: theirs.reshape(()), lambda ours: np.reshape(ours, 1))


def tokenizer(source: Source) -> Tokenizer | None:
    """That beside the weights, which reads texts as the model was taught: in lower case, at the end `END` and no more.

    Where nothing names its token for padding, SigLIP's is the end.
    """
    found = tokenizer_beside(source)
    return None if found is None else canonical(found)


def canonical(found: Tokenizer) -> Tokenizer:
    """The same, but that a text's capitals are small first, and, of the first SigLIP, that it has no punctuation."""
    english = found.vocab_size <= ENGLISH
    before: list[Any] = [normalizers.Lowercase()]
    if english:
        before += [
            normalizers.Replace(tokenizers.Regex(PUNCTUATION), ""),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    inner = tokenizers.Tokenizer.from_str(found.tokenizer.to_str())
    inner.encode_special_tokens = True
    inner.normalizer = normalizers.Sequence([*before, *([] if inner.normalizer is None else [inner.normalizer])])
    pad_id = found.eos_id if english else found.pad_id
    return replace(found, tokenizer=inner, bos_id=None, pad_id=pad_id)


def fields(source: Source) -> tuple[Field, ...]:
    return (shown(source).image, Caption())


def check_expressible(config: clip.Config) -> None:
    """Refuses what SigLIP's architecture is not, by the setting's name."""
    image, text = config.image, config.text
    settings = {
        "objective": (config.objective, "sigmoid"),
        "projection": (config.projection, False),
        "image.pool": (image.pool, "attention"),
        "image.pre_norm": (image.pre_norm, False),
        "image.patch_bias": (image.patch_bias, True),
        "text.pool": (text.pool, "last"),
    }
    require(settings, "SigLIP")


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    model = experiment.model
    check_expressible(model)
    text = told_of(model.text, "siglip_text_model") | {"projection_size": model.embedding}
    if tokenizer is not None:
        text |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    return {
        "config.json": {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": text,
            "vision_config": told_of(model.image, "siglip_vision_model"),
            "torch_dtype": experiment.frozen_dtype or "float32",
        },
        PREPROCESSOR: processor(experiment, model.image, "SiglipImageProcessor"),
    }


LAYOUT = Layout(
    name="siglip",
    family="clip",
    recognises=lambda source: KEY in source.tensors,
    config=config,
    entries=entries,
    fields=fields,
    tokenizer=tokenizer,
    idle=(IDLE,),
    export=export,
)
