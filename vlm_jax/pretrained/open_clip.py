"""CLIP as open_clip keeps it: `open_clip_model.safetensors` beside `open_clip_config.json`; the keys are OpenAI's.

Its images are cut to the pixel as by `transformers`, which of an odd number of pixels too many has the smaller half
before the cut; open_clip's own reader rounds half of these the other way.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.data import Caption, Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import clip
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.pretrained.clip_hf import check_expressible
from vlm_jax.pretrained.hf_towers import fused_entries, patch_entry, row_entry
from vlm_jax.pretrained.images import METHODS, Pixels, cropping, pixels, processor, square
from vlm_jax.pretrained.layout import Entry, Layout, linear, norm
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import Source
from vlm_jax.pretrained.tensors import BFLOAT16
from vlm_jax.records import to_json

SETTINGS = "open_clip_config.json"
EPS = 1e-5
"""Of every norm, as PyTorch has it."""
WHOLE: dict[str, Any] = {"embed_dim": 512, "quick_gelu": False, "init_logit_scale": None, "custom_text": False}
SEEING: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "patch_dropout": 0.0,
}
READING: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49_408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
"""What a setting is that is left out, of those that can be expressed."""
PLAIN: dict[str, Any] = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
"""What else may be said, for it says what is so anyway; as may whatever is False, None or 0."""
UNUSED = ("timm_", "hf_", "attn_pooler_", "pad_id", "eos_id", "tokenizer_kwargs", "output_tokens")
"""Settings, by how they begin, of what a tower has not that is no timm's and no Hugging Face's."""


def known(told: Mapping[str, Any], usual: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings with what is left out; raises a `UserError` that names one which cannot be expressed."""
    for name, value in told.items():
        named_other = name in ("timm_model_name", "hf_model_name") and value
        fine = name in usual or not value or value in PLAIN.get(name, ()) or name.startswith(UNUSED)
        if named_other or not fine or (name == "custom_text" and value):
            raise UserError(f"{name} in {where} is {value!r}, which the towers of CLIP here cannot express")
    return {**usual, **told}


def stack(told: Mapping[str, Any], heads: int, *, quick: bool, dtype: np.dtype[Any]) -> Transformer:
    return Transformer(
        width=told["width"],
        depth=told["layers"],
        heads=heads,
        mlp=int(told["width"] * told["mlp_ratio"]),
        activation="quick_gelu" if quick else "gelu",
        norm_eps=EPS,
        dtype="bfloat16" if dtype == BFLOAT16 else "float32",
    )


def shown(source: Source) -> Pixels:
    """What is done to images."""
    told, where = source.beside(SETTINGS), str(source.directory / SETTINGS)
    size = {**SEEING, **told.get("model_cfg", {}).get("vision_cfg", {})}["image_size"]
    does = dict(told.get("preprocess_cfg") or {})
    names = {method: number for number, method in METHODS.items()}
    processed: dict[str, Any] = {"resample": names.get(does.get("interpolation", "bicubic"), does.get("interpolation"))}
    for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
        processed |= {ours: does[theirs]} if theirs in does else {}
    if does.get("resize_mode", "shortest") == "squash":
        processed |= {"size": square(size), "do_center_crop": False}
    elif does.get("resize_mode", "shortest") != "shortest":
        raise UserError(f"resize_mode in {where} is {does['resize_mode']!r}: shortest and squash can be expressed")
    return pixels(processed, cropping(size), size, where)


def config(source: Source) -> clip.Config:
    where, dtype = str(source.directory / SETTINGS), source.tensors.dtype("logit_scale")
    if "model_cfg" not in source.beside(SETTINGS):
        raise UserError(f"{where} does not say what the model is: bring it from where the weights are")
    told = known(source.beside(SETTINGS)["model_cfg"], {**WHOLE, "vision_cfg": {}, "text_cfg": {}}, where)
    image, text = known(told["vision_cfg"], SEEING, where), known(told["text_cfg"], READING, where)
    seen, quick = shown(source), bool(told["quick_gelu"])
    try:
        found = clip.Config(
            image=VisionTransformer(
                image_size=image["image_size"],
                patch_size=image["patch_size"],
                pre_norm=True,
                patch_bias=False,
                mean=seen.mean,
                std=seen.std,
                transformer=stack(image, image["width"] // image["head_width"], quick=quick, dtype=dtype),
            ),
            text=TextTransformer(
                vocab_size=text["vocab_size"],
                context_length=text["context_length"],
                eos_id=text["vocab_size"] - 1,  # a text is read at its highest id
                transformer=stack(text, text["heads"], quick=quick, dtype=dtype),
            ),
            embedding=told["embed_dim"],
        )
        to_json(found)  # refuses what is not of the declared types
    except (TypeError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{where} does not hold the settings of two towers ({error})") from error
    return found


def block_entries(path: str, key: str) -> Iterator[Entry]:
    yield from norm(f"{path}/attention_norm", f"{key}.ln_1")
    yield from fused_entries(f"{path}/attention", f"{key}.attn")
    yield from norm(f"{path}/mlp_norm", f"{key}.ln_2")
    yield from linear(f"{path}/mlp/up", f"{key}.mlp.c_fc")
    yield from linear(f"{path}/mlp/down", f"{key}.mlp.c_proj")


def entries(config: clip.Config) -> Iterator[Entry]:
    image, text = config.image, config.text
    yield patch_entry("image/patch/kernel", "visual.conv1.weight", image.patch_size, image.channels)
    yield row_entry("image/class_token", "visual.class_embedding", 2)
    yield row_entry("image/position", "visual.positional_embedding")
    yield from norm("image/pre_norm", "visual.ln_pre")
    for i in range(image.transformer.depth):
        yield from block_entries(f"image/transformer/block_{i}", f"visual.transformer.resblocks.{i}")
    yield from norm("image/transformer/final_norm", "visual.ln_post")
    yield Entry("image_projection/kernel", "visual.proj")
    yield Entry("text/token/embedding", "token_embedding.weight")
    yield row_entry("text/position", "positional_embedding")
    for i in range(text.transformer.depth):
        yield from block_entries(f"text/transformer/block_{i}", f"transformer.resblocks.{i}")
    yield from norm("text/transformer/final_norm", "ln_final")
    yield Entry("text/projection/kernel", "text_projection")
    yield Entry("log_scale", "logit_scale", lambda theirs: theirs.reshape(()), np.asarray)


def fields(source: Source) -> tuple[Field, ...]:
    return (shown(source).image, Caption())


def check_openai(config: clip.Config) -> None:
    """Refuses what no model of these keys is, by the setting's name."""
    check_expressible(config)
    image, text = config.image, config.text
    settings = {
        "image.channels": (image.channels, 3),
        "image.transformer.norm_eps": (image.transformer.norm_eps, EPS),
        "text.transformer.norm_eps": (text.transformer.norm_eps, EPS),
        "text.eos_id": (text.eos_id, text.vocab_size - 1),
        "text.transformer.activation": (text.transformer.activation, image.transformer.activation),
    }
    require(settings, "open_clip")


def ratio(transformer: Transformer) -> float:
    """Of the hidden units to the width, as a number whose product with the width is rounded down to these."""
    exact = transformer.mlp / transformer.width
    return exact if int(exact * transformer.width) == transformer.mlp else (transformer.mlp + 0.5) / transformer.width


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    model = experiment.model
    check_openai(model)
    image, text = model.image.transformer, model.text.transformer
    if image.activation not in ("gelu", "quick_gelu"):
        raise UserError(f"image.transformer.activation is {image.activation!r}: open_clip has gelu and quick_gelu")
    does = processor(experiment, model.image, "CLIPImageProcessor")
    if (method := METHODS[does["resample"]]) not in ("bilinear", "bicubic"):
        raise UserError(
            f"data.fields scale by {method!r}: open_clip has bilinear and bicubic, and the model stays a run"
        )
    vision_cfg = {
        "image_size": model.image.image_size,
        "patch_size": model.image.patch_size,
        "layers": image.depth,
        "width": image.width,
        "head_width": image.width // image.heads,
        "mlp_ratio": ratio(image),
    }
    text_cfg = {
        "context_length": model.text.context_length,
        "vocab_size": model.text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": ratio(text),
    }
    model_cfg = {"embed_dim": model.embedding, "quick_gelu": image.activation == "quick_gelu"}
    preprocess_cfg = {
        "mean": does["image_mean"],
        "std": does["image_std"],
        "interpolation": method,
        "resize_mode": "shortest" if does["do_center_crop"] else "squash",
    }
    whole = {"model_cfg": {**model_cfg, "vision_cfg": vision_cfg, "text_cfg": text_cfg}}
    return {SETTINGS: {**whole, "preprocess_cfg": preprocess_cfg}}


LAYOUT = Layout(
    name="open-clip",
    family="clip",
    recognises=lambda source: "visual.conv1.weight" in source.tensors and bool(source.beside(SETTINGS)),
    config=config,
    entries=entries,
    fields=fields,
    export=export,
    weights={"": "open_clip_model.safetensors"},
)
