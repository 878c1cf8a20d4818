"""The text tower of a CLIP alone in safetensors, as Hugging Face keeps it and Stable Diffusion's `text_encoder` is.

`CLIPTextModel` and `CLIPTextModelWithProjection`, whose projection is passed over: a text is told of by its tokens.
"""

from typing import Any

from vlm_jax.data import Caption, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import text_encoder
from vlm_jax.nn.text import TextTransformer
from vlm_jax.pretrained.clip_hf import end_id, end_told
from vlm_jax.pretrained.hf_towers import IDLE, text_config, text_entries, told_of
from vlm_jax.pretrained.layout import Layout
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import Source

KIND = "clip_text_model"
KEYS = {"clip-text": "text_model.", "clip-text-v5": ""}
"""What keys begin with: of files of the hub and of transformers 4; of those that 5 writes. Written is the first, which
every version reads."""


def recognises(theirs: str, source: Source) -> bool:
    return source.config.get("model_type") == KIND and f"{theirs}final_layer_norm.weight" in source.tensors


def config_of(theirs: str, source: Source) -> text_encoder.Config:
    told, where = source.config, str(source.directory / "config.json")
    if told.get("model_type") != KIND:
        raise UserError(f"model_type in {where} is {told.get('model_type')!r}: give the text tower of a CLIP alone")
    dtype = source.tensors.dtype(f"{theirs}final_layer_norm.weight")
    return text_encoder.Config(network=text_config(told, KIND, end_id(dict(told), where), dtype=dtype, where=where))


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    network = getattr(experiment.model, "network", None)
    require({"network": (type(network).__name__, "TextTransformer")}, "CLIP")
    assert isinstance(network, TextTransformer)
    require({"network.pool": (network.pool, "eos")}, "CLIP")
    told = told_of(network, KIND) | {"eos_token_id": end_told(network)}
    if tokenizer is not None:
        told |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    dtype = experiment.frozen_dtype or "float32"
    return {"config.json": {"architectures": ["CLIPTextModel"], **told, "torch_dtype": dtype}}


def layout_of(name: str) -> Layout:
    theirs = KEYS[name]
    return Layout(
        name=name,
        family="text_encoder",
        recognises=lambda source: recognises(theirs, source),
        config=lambda source: config_of(theirs, source),
        entries=lambda config: text_entries(config.network, "network/", theirs),
        fields=lambda source: (Caption(),),
        idle=(IDLE, r"text_projection\.weight"),
        export=export if name == "clip-text" else None,
    )


LAYOUTS = tuple(map(layout_of, KEYS))
