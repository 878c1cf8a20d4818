"""Language models of Llama's architecture in safetensors, as Hugging Face keeps them (transformers 4 and 5).

`LlamaForCausalLM`; `Qwen2ForCausalLM`, with biases of queries, keys and values; `Qwen3ForCausalLM`, with a norm of each
head. The functions take the settings and the prefixes of keys, for models that hold such a one as a part.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.data import Tokenizer
from vlm_jax.data.config import Field
from vlm_jax.data.conversation import Dialogue
from vlm_jax.data.fields import Document
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import language
from vlm_jax.nn.decoder import DecoderConfig, RotaryScaling
from vlm_jax.pretrained.layout import Entry, Layout, linear, norm
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.source import Source, tokenizer_beside
from vlm_jax.pretrained.tensors import BFLOAT16
from vlm_jax.records import to_json

KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
    },
}
KINDS["qwen3"] = KINDS["qwen2"] | {"head_dim": 128}
"""By `model_type`, what a setting is that config.json leaves out (transformers' configuration classes)."""
REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (None,),
}
"""Settings that change the function and that the decoder has in one way only, which is what they are when left out."""
SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def language_config(told: Mapping[str, Any], eos_id: int, *, dtype: np.dtype[Any], where: str) -> language.Config:
    """The settings that a `config.json`, or a part of one, tells.

    Args:
      dtype: of the published weights; of bfloat16 ones the model computes in bfloat16, else in float32.
      where: the file, for messages.

    Raises:
      UserError: it has a setting that the decoder cannot express, which is named.
    """
    kind = told.get("model_type")
    if kind not in KINDS:
        raise UserError(f"model_type in {where} is {kind!r}: the decoder expresses {', '.join(KINDS)}")
    for name, values in REQUIRED.items():
        if told.get(name, values[0]) not in values:
            raise UserError(f"{name} in {where} is {told[name]!r}, which the decoder cannot express: {values[0]!r} is")
    if other := set(told.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"layer_types in {where} has {sorted(other)[0]!r}, which the decoder cannot express")
    told = KINDS[kind] | dict(told)
    heads, rotary = told["num_attention_heads"], rotations(told, where)
    try:
        config = language.Config(
            vocab_size=told["vocab_size"],
            context_length=told["max_position_embeddings"],
            eos_id=eos_id,
            tied=told.get("tie_word_embeddings", False),
            decoder=DecoderConfig(
                width=told["hidden_size"],
                depth=told["num_hidden_layers"],
                heads=heads,
                kv_heads=told.get("num_key_value_heads") or heads,
                head_width=told.get("head_dim") or told["hidden_size"] // heads,
                mlp=told["intermediate_size"],
                qkv_bias=kind == "qwen2",
                qk_norm="rms" if kind == "qwen3" else "none",
                norm_eps=told.get("rms_norm_eps", 1e-6),
                dtype="bfloat16" if dtype == BFLOAT16 else "float32",
                **rotary,
            ),
        )
        to_json(config)  # refuses what is not of the declared types
    except (TypeError, KeyError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{where} does not hold the settings of a decoder ({error}): fetch it again") from error
    return config


def rotations(told: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Base and scaling of the rotary positions, by transformers 5's names or 4's."""
    rope = dict(told.get("rope_scaling") or told.get("rope_parameters") or {})
    base = float(rope.pop("rope_theta", told.get("rope_theta", 10_000.0)))
    kind: Any = rope.get("rope_type", rope.get("type", "default"))
    given = rope.keys() - {"rope_type", "type", "partial_rotary_factor"}
    if rope.get("partial_rotary_factor", 1) != 1 or given != {"default": set(), "llama3": SCALING}.get(kind):
        raise UserError(f"the rotary positions in {where} are {rope}: the decoder has plain ones and llama3's")
    if kind == "default":
        return {"rope_base": base}
    scaling = RotaryScaling(
        factor=float(rope["factor"]),
        low_frequency=float(rope["low_freq_factor"]),
        high_frequency=float(rope["high_freq_factor"]),
        original_length=int(rope["original_max_position_embeddings"]),
    )
    return {"rope_base": base, "rope_scaling": scaling}


def told_of(config: language.Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The inverse: a `config.json`, which transformers 4 and 5 read.

    Raises:
      UserError: no class of transformers has these settings.
    """
    d = config.decoder
    require({"decoder": (type(d).__name__, DecoderConfig.__name__)}, "Llama")
    kinds = {(False, "none"): "llama", (True, "none"): "qwen2", (False, "rms"): "qwen3"}
    if (kind := kinds.get((d.qkv_bias, d.qk_norm))) is None:
        raise UserError(
            f"no published layout has qkv_bias {d.qkv_bias} with qk_norm {d.qk_norm!r}: the model stays a run"
        )
    if d.head_width * d.heads != d.width and kind == "qwen2":
        raise UserError(f"Qwen2's heads are of width / heads features, and these are of {d.head_width}: it stays a run")
    scaling = d.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind] + "ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": d.width,
        "intermediate_size": d.mlp,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": d.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": d.rope_base,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {"rope_theta": d.rope_base, **rope},
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": None if tokenizer is None else tokenizer.pad_id,
    }


def language_entries(
    config: language.Config, *, ours: str = "", body: str = "model.", head: str = "lm_head"
) -> Iterator[Entry]:
    """The table.

    Args:
      ours: the path of the model among our parameters, with a slash at its end.
      body: of their keys, all but the head's.
      head: of the key of the table by which tokens are predicted.
    """
    d = config.decoder
    yield Entry(f"{ours}token/embedding", f"{body}embed_tokens.weight")
    # A tied table may have been saved under both names.
    yield Entry(f"{ours}{'token' if config.tied else 'head'}/embedding", f"{head}.weight", repeats=config.tied)
    yield from norm(f"{ours}decoder/final_norm", f"{body}norm", bias=False)
    for i in range(d.depth):
        block, layer = f"{ours}decoder/block_{i}", f"{body}layers.{i}"
        yield from norm(f"{block}/attention_norm", f"{layer}.input_layernorm", bias=False)
        for name, key in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            yield from linear(f"{block}/attention/{name}", f"{layer}.self_attn.{key}", bias=d.qkv_bias)
        yield from linear(f"{block}/attention/out", f"{layer}.self_attn.o_proj", bias=False)
        if d.qk_norm != "none":
            for name, key in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                yield from norm(f"{block}/attention/{name}", f"{layer}.self_attn.{key}", bias=d.qk_norm == "layer")
        yield from norm(f"{block}/mlp_norm", f"{layer}.post_attention_layernorm", bias=False)
        for name in ("gate", "up", "down"):
            yield from linear(f"{block}/mlp/{name}", f"{layer}.mlp.{name}_proj", bias=False)


def end_of_text(source: Source, told: Mapping[str, Any]) -> int:
    """The token that ends a text: the tokenizer's, which must be among those that the settings name.

    Raises:
      UserError: it is not, or nothing names one.
    """
    named = source.beside("generation_config.json").get("eos_token_id", told.get("eos_token_id"))
    ends = [*(named if isinstance(named, list) else [named])] if named is not None else []
    tokenizer = tokenizer_beside(source)
    if tokenizer is None:
        if not ends:
            raise UserError(f"nothing in {source.directory} says which token ends a text: bring its tokenizer.json")
        return int(ends[0])
    if ends and tokenizer.eos_id not in ends:
        raise UserError(
            f"the tokenizer in {source.directory} ends a text with the id {tokenizer.eos_id} and eos_token_id is "
            f"{named}: bring the tokenizer that belongs to the weights"
        )
    return tokenizer.eos_id


def config(source: Source) -> language.Config:
    return language_config(
        source.config,
        end_of_text(source, source.config),
        dtype=source.tensors.dtype("model.embed_tokens.weight"),
        where=str(source.directory / "config.json"),
    )


def text_fields(tokenizer: Tokenizer | None) -> tuple[Field, ...]:
    """How records become texts: as they are, or questions and answers as a chat by the tokenizer's own template."""
    own = tokenizer is not None and tokenizer.chat_template is not None
    return (Document(), Dialogue(template=None) if own else Dialogue())


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    told = told_of(experiment.model, tokenizer)
    return {"config.json": told | {"torch_dtype": experiment.frozen_dtype or "float32"}}


LAYOUT = Layout(
    name="llama",
    family="language",
    recognises=lambda source: (
        source.config.get("model_type") in KINDS and "model.embed_tokens.weight" in source.tensors
    ),
    config=config,
    entries=language_entries,
    fields=lambda source: text_fields(tokenizer_beside(source)),
    idle=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    export=export,
)
