"""T5's encoder in safetensors, as Hugging Face keeps it (transformers 4 and 5): v1.0 and v1.1.

`T5EncoderModel`, or `T5ForConditionalGeneration`, of which the decoder is passed over. The functions take the settings
and the path of an encoder, for models that hold one as a part.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_jax.data import Caption, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import text_encoder
from vlm_jax.nn.t5 import T5
from vlm_jax.pretrained.layout import Entry, Layout, linear, norm
from vlm_jax.pretrained.settings import expects, require
from vlm_jax.pretrained.source import Source
from vlm_jax.pretrained.tensors import BFLOAT16
from vlm_jax.records import to_json

TABLE = "shared.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
USUAL: dict[str, Any] = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "eos_token_id": 1,
    "n_positions": 512,
}
"""What a setting is that config.json leaves out (transformers' `T5Config`); the length is that of the pretraining."""
FEED_FORWARD: dict[str, Any] = {
    "relu": ("relu", {"dense_act_fn": "relu", "is_gated_act": False}),
    "gated-gelu": ("gated_gelu", {"dense_act_fn": "gelu_new", "is_gated_act": True}),
}
"""Theirs -> ours, and what files of newer versions say of the same besides."""


def t5_config(told: Mapping[str, Any], *, dtype: np.dtype[Any], where: str) -> T5:
    """The settings that a `config.json` tells.

    Args:
      dtype: of the published weights; of bfloat16 ones the model computes in bfloat16, else in float32.
      where: the file, for messages.

    Raises:
      UserError: it has a setting that the encoder cannot express, which is named.
    """
    expects(told, {"model_type": "t5", "is_decoder": False, "quantization_config": None}, where)
    told = USUAL | dict(told)
    kind, eos_id = told["feed_forward_proj"], told["eos_token_id"]
    if not isinstance(kind, str) or kind not in FEED_FORWARD:
        raise UserError(f"feed_forward_proj in {where} is {kind!r}: there are {', '.join(FEED_FORWARD)}")
    feed_forward, follows = FEED_FORWARD[kind]
    expects(told, follows, where)
    if not isinstance(eos_id, int):
        raise UserError(f"eos_token_id in {where} is {eos_id}: a text ends at one token")
    try:
        config = T5(
            vocab_size=told["vocab_size"],
            context_length=told["n_positions"],
            eos_id=eos_id,
            width=told["d_model"],
            depth=told["num_layers"],
            heads=told["num_heads"],
            head_width=told["d_kv"],
            mlp=told["d_ff"],
            feed_forward=feed_forward,
            buckets=told["relative_attention_num_buckets"],
            max_distance=told["relative_attention_max_distance"],
            norm_eps=told["layer_norm_epsilon"],
            dtype="bfloat16" if dtype == BFLOAT16 else "float32",
        )
        to_json(config)  # refuses what is not of the declared types
    except (TypeError, UserError) as error:
        raise UserError(f"{where} does not hold the settings of an encoder ({error}): fetch it again") from error
    return config


def told_of(config: T5, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The inverse: a `config.json`, which transformers 4 and 5 read."""
    kind = next(theirs for theirs, (ours, _) in FEED_FORWARD.items() if ours == config.feed_forward)
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.mlp,
        "num_layers": config.depth,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": kind,
        "is_encoder_decoder": False,
        "use_cache": False,
        "n_positions": config.context_length,
        "eos_token_id": config.eos_id,
        "pad_token_id": 0 if tokenizer is None else tokenizer.pad_id,
    }


def t5_entries(config: T5, ours: str = "") -> Iterator[Entry]:
    """The table.

    Args:
      ours: the path of the encoder among our parameters, with a slash at its end.
    """
    yield Entry(f"{ours}token/embedding", TABLE)
    # The same table by its name within the encoder, under which some files have it besides.
    yield Entry(f"{ours}token/embedding", "encoder.embed_tokens.weight", repeats=True)
    yield Entry(f"{ours}relative_bias", BIAS)
    yield from norm(f"{ours}final_norm", "encoder.final_layer_norm", bias=False)
    relu = config.feed_forward == "relu"
    for i in range(config.depth):
        block, layer = f"{ours}block_{i}", f"encoder.block.{i}.layer"
        yield from norm(f"{block}/attention_norm", f"{layer}.0.layer_norm", bias=False)
        for name, key in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            yield from linear(f"{block}/attention/{name}", f"{layer}.0.SelfAttention.{key}", bias=False)
        yield from norm(f"{block}/mlp_norm", f"{layer}.1.layer_norm", bias=False)
        names = (("up", "wi"),) if relu else (("gate", "wi_0"), ("up", "wi_1"))
        for name, key in (*names, ("down", "wo")):
            yield from linear(f"{block}/mlp/{name}", f"{layer}.1.DenseReluDense.{key}", bias=False)


def config(source: Source) -> text_encoder.Config:
    where = str(source.directory / "config.json")
    return text_encoder.Config(network=t5_config(source.config, dtype=source.tensors.dtype(TABLE), where=where))


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    network = getattr(experiment.model, "network", None)
    require({"network": (type(network).__name__, "T5")}, "T5")
    assert isinstance(network, T5)
    return {"config.json": told_of(network, tokenizer) | {"torch_dtype": experiment.frozen_dtype or "float32"}}


LAYOUT = Layout(
    name="t5",
    family="text_encoder",
    recognises=lambda source: BIAS in source.tensors,
    config=config,
    entries=lambda config: t5_entries(config.network, "network/"),
    fields=lambda source: (Caption(),),
    idle=(r"decoder\..*", r"lm_head\.weight"),
    export=export,
)
