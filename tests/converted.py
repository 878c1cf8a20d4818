"""Small published weights, made for the tests: a directory of Llama's, and a GGUF of the same."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import numpy as np
from safetensors.numpy import save_file

from reference import random_params
from vlm_jax.data import Tokenizer, train_tokenizer
from vlm_jax.models import language
from vlm_jax.nn.decoder import DecoderConfig, RotaryScaling
from vlm_jax.pretrained.layout import Layout, abstract_params, written, written_keys
from vlm_jax.pretrained.llama import LAYOUT

TOKENIZER = train_tokenizer(["the red circle is left of the blue one", "how many circles are red?"], 280)
CONFIG = language.Config(
    vocab_size=TOKENIZER.vocab_size,
    context_length=32,
    eos_id=TOKENIZER.eos_id,
    tied=True,
    decoder=DecoderConfig(width=24, depth=2, heads=4, kv_heads=2, head_width=6, mlp=40, rope_base=500.0, norm_eps=1e-5),
)
SCALED = RotaryScaling(factor=8.0, original_length=8192)
KINDS = {
    "llama": CONFIG,
    "untied": replace(
        CONFIG, tied=False, decoder=replace(CONFIG.decoder, rope_base=1e5, rope_scaling=SCALED, head_width=10)
    ),
    "qwen2": replace(CONFIG, decoder=replace(CONFIG.decoder, qkv_bias=True)),
    "qwen3": replace(CONFIG, decoder=replace(CONFIG.decoder, qk_norm="rms", head_width=10)),
}


def random_weights(config: language.Config, layout: Layout = LAYOUT, seed: int = 0) -> dict[str, np.ndarray]:
    """Of a layout, by its keys."""
    params = random_params(abstract_params(config), 0.3, seed)
    return dict(written(layout, config, params, written_keys(layout, config, params)))


def write_llama(
    directory: Path, config: language.Config, weights: dict[str, np.ndarray], tokenizer: Tokenizer = TOKENIZER, **told
) -> Path:
    """A directory as Hugging Face has it; `told` are other settings of its config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors")
    tokenizer.save(directory / "tokenizer.json")
    d, scaling = config.decoder, config.decoder.rope_scaling
    rope = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = scaling.original_length
    settings = {
        "model_type": "qwen2" if d.qkv_bias else "qwen3" if d.qk_norm == "rms" else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": d.width,
        "intermediate_size": d.mlp,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": d.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_theta": d.rope_base, **rope},
        "eos_token_id": [0, config.eos_id],
    }
    (directory / "config.json").write_text(json.dumps(settings | told))
    return directory


def write_gguf(
    path: Path,
    config: language.Config,
    weights: dict[str, np.ndarray],
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    **told: object,
) -> Path:
    """A file as llama.cpp has it.

    Args:
      types: of the arrays whose keys end so; the others are float32.
      told: other metadata, a double underscore for a dot.
    """
    d, tokenizer = config.decoder, json.loads(TOKENIZER.tokenizer.to_str())
    kind = "qwen2" if d.qkv_bias else "qwen3" if d.qk_norm == "rms" else "llama"
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(d.width)
    writer.add_block_count(d.depth)
    writer.add_feed_forward_length(d.mlp)
    writer.add_head_count(d.heads)
    writer.add_head_count_kv(d.kv_heads)
    writer.add_key_length(d.head_width)
    writer.add_rope_freq_base(d.rope_base)
    writer.add_layer_norm_rms_eps(d.norm_eps)
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    facts = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "smollm",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": [3 if token.startswith("<") and len(token) > 2 else 1 for token in tokens],
        "tokenizer__ggml__merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer__ggml__bos_token_id": TOKENIZER.bos_id,
        "tokenizer__ggml__eos_token_id": TOKENIZER.eos_id,
        "tokenizer__ggml__add_bos_token": False,
        "tokenizer__chat_template": "{{ messages }}",
    }
    for name, value in (facts | told).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](name.replace("__", "."), value)
    for key, array in weights.items():
        found = next((each for end, each in (types or {}).items() if key.endswith(end)), gguf.GGMLQuantizationType.F32)
        if found == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(key, array)
        else:
            writer.add_tensor(key, gguf.quantize(array, found), raw_dtype=found)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def assert_trees_equal(first: object, second: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)
