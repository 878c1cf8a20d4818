"""LLaVA-1.5 in safetensors: Hugging Face's files and models of transformers 4 and 5, and the authors' own.

The five are one table with other keys. Written is the one of the hub, which every version of transformers reads.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from vlm_jax.data import Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.data.conversation import V1, VisualCaption, VisualQuestion
from vlm_jax.data.fields import Image
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import llava
from vlm_jax.pretrained.hf_towers import IDLE, vision_config, vision_entries
from vlm_jax.pretrained.hf_towers import told_of as told_of_tower
from vlm_jax.pretrained.images import Pixels, cropping, pixels, processor
from vlm_jax.pretrained.layout import Entry, Layout, linear
from vlm_jax.pretrained.llama import end_of_text, language_config, language_entries, told_of
from vlm_jax.pretrained.settings import expects, require
from vlm_jax.pretrained.source import Source, tokenizer_beside

TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""Of `openai/clip-vit-large-patch14-336`, which the authors' config.json names; `LlavaConfig`'s default."""
KIND = "clip_vision_model"


class Keys(NamedTuple):
    """What the keys of the parts begin with."""

    vision: str
    projector: tuple[str, ...]
    language: str
    head: str


FILE, STATE = (tuple(f"{whole}multi_modal_projector.linear_{i}" for i in (1, 2)) for whole in ("", "model."))
KEYS = {
    "llava": Keys("vision_tower.vision_model.", FILE, "language_model.model.", "language_model.lm_head"),
    "llava-v5": Keys("vision_tower.", FILE, "language_model.model.", "language_model.lm_head"),
    "llava-state-v4": Keys("model.vision_tower.vision_model.", STATE, "model.language_model.", "lm_head"),
    "llava-state-v5": Keys("model.vision_tower.", STATE, "model.language_model.", "lm_head"),
    "llava-original": Keys(
        "model.vision_tower.vision_tower.vision_model.",
        ("model.mm_projector.0", "model.mm_projector.2"),
        "model.",
        "lm_head",
    ),
}
"""Files of the hub and of transformers 4; files of 5; what `state_dict()` of 4.57 and of 5 has; the authors' files."""
ORIGINAL = KEYS["llava-original"]


def recognises(keys: Keys, source: Source) -> bool:
    due = [f"{keys.projector[0]}.weight", f"{keys.language}embed_tokens.weight"]
    if keys is not ORIGINAL:  # which is published without its tower too, and refused by name then
        due.append(f"{keys.vision}embeddings.class_embedding")
    return all(key in source.tensors for key in due)


def config_of(keys: Keys, source: Source) -> llava.Config:
    """The settings of config.json, Hugging Face's or the authors'.

    Raises:
      UserError: it has one that the model cannot express, or there is no tower among the weights.
    """
    where, told = str(source.directory / "config.json"), source.config
    if f"{keys.vision}embeddings.class_embedding" not in source.tensors:
        raise UserError(
            f"{source.path} holds no image tower, which LLaVA's authors left out ({told.get('mm_vision_tower')}): "
            f"convert the weights of the same model on the hub, such as llava-hf/llava-1.5-7b-hf"
        )
    vision, text, layer = original_settings(told, where) if keys is ORIGINAL else settings(told, where)
    depth = vision["num_hidden_layers"]
    if layer % (depth + 1) == depth:
        raise UserError(f"the features of {where} are of the last layer, before its norm: only earlier ones are read")
    dtype = source.tensors.dtype(f"{keys.language}embed_tokens.weight")
    features = depth - layer % (depth + 1)
    return llava.Config(
        vision=vision_config(vision, KIND, shown(source, vision), dtype=dtype, where=where, features=features),
        language=language_config(text, end_of_text(source, text), dtype=dtype, where=where),
    )


def shown(source: Source, vision: Mapping[str, Any]) -> Pixels:
    """What the processor does to images."""
    size, name = vision["image_size"], "preprocessor_config.json"
    return pixels(source.beside(name), cropping(size), size, str(source.directory / name))


def vision_settings(told: Mapping[str, Any]) -> dict[str, Any]:
    return TOWER | dict(told.get("vision_config") or {})


def settings(told: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Hugging Face's: of the tower, of the language model, and the layer whose features are read."""
    strategy = {"vision_feature_select_strategy": "default", "multimodal_projector_bias": True}
    expects(told, {"model_type": "llava", "projector_hidden_act": "gelu", **strategy}, where)
    vision, layer = vision_settings(told), told.get("vision_feature_layer", -2)
    expects(vision, {"model_type": KIND}, where)
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer in {where} is {layer}, and features are of one layer")
    text = {"model_type": "llama", **(told.get("text_config") or {})}
    tied = told.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    return vision, text | {"tie_word_embeddings": tied}, layer


def original_settings(told: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The authors', who say everything in one place and the tower by its name."""
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"} if "vision_config" not in told else {}
    expects(told, {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", **tower}, where)
    return vision_settings(told), {**told, "model_type": "llama"}, told.get("mm_vision_select_layer", -2)


def entries_of(keys: Keys, config: llava.Config) -> Iterator[Entry]:
    yield from vision_entries(config.vision, "vision/", keys.vision)
    for name, key in zip(("hidden", "out"), keys.projector, strict=True):
        yield from linear(f"projector/{name}", key)
    yield from language_entries(config.language, ours="language/", body=keys.language, head=keys.head)


def fields(source: Source) -> tuple[Field, ...]:
    """Conversations by the tokenizer's own template, or Vicuna's."""
    tokenizer, image = tokenizer_beside(source), shown(source, vision_settings(source.config)).image
    template = V1 if tokenizer is None or tokenizer.chat_template is None else None
    return VisualQuestion(template=template, image=image), VisualCaption(template=template, image=image)


def check_expressible(config: llava.Config) -> None:
    """Refuses what LLaVA's architecture is not, by the setting's name."""
    settings = {
        "projector": (config.projector, "mlp2x_gelu"),
        "shuffle": (config.shuffle, 1),
        "attention": (config.attention, "causal"),
        "vision.pool": (config.vision.pool, "class"),
        "vision.pre_norm": (config.vision.pre_norm, True),
        "vision.patch_bias": (config.vision.patch_bias, False),
        "vision.features": (config.vision.features, max(config.vision.features, 1)),  # 0 is after the last norm
    }
    require(settings, "LLaVA")


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    config: llava.Config = experiment.model
    check_expressible(config)
    image = next((field.image for field in experiment.data.fields if isinstance(field, VisualQuestion)), Image())
    shown = replace(experiment, data=replace(experiment.data, fields=(image,)))
    return {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "vision_config": told_of_tower(config.vision, KIND),
            "text_config": told_of(config.language, tokenizer),
            "tie_word_embeddings": config.language.tied,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": -1 - config.vision.features,
            "vision_feature_select_strategy": "default",
            "image_seq_length": config.image_tokens,
            # No token stands for an image here: the highest, which LLaVA-1.5 has among those that nothing says.
            "image_token_index": min(32_000, config.language.vocab_size - 1),
            "torch_dtype": experiment.frozen_dtype or "float32",
        },
        "preprocessor_config.json": processor(shown, config.vision, "CLIPImageProcessor"),
    }


def layout_of(name: str) -> Layout:
    keys = KEYS[name]
    return Layout(
        name=name,
        family="llava",
        recognises=lambda source: recognises(keys, source),
        config=lambda source: config_of(keys, source),
        entries=lambda config: entries_of(keys, config),
        fields=fields,
        idle=(
            IDLE,
            rf"{re.escape(keys.language)}layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        ),
        export=export if name == "llava" else None,
    )


LAYOUTS = tuple(map(layout_of, KEYS))
