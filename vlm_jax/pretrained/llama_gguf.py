"""Language models of Llama's architecture in GGUF, llama.cpp's one file for settings, weights and tokenizer.

llama.cpp turns neighbouring features, and so permutes the rows of Llama's queries and keys, head by head; of the other
architectures it turns halves, as we do. Quantised values are read as what they stand for.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vlm_jax.data import Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.models import language
from vlm_jax.nn.decoder import DecoderConfig, RotaryScaling, rotary_frequencies
from vlm_jax.pretrained.gguf_tokenizer import tokenizer_of
from vlm_jax.pretrained.layout import Entry, Layout
from vlm_jax.pretrained.llama import text_fields
from vlm_jax.pretrained.source import Source

KINDS = ("llama", "qwen2", "qwen3")
"""Values of general.architecture."""
LLAMA_3 = RotaryScaling(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_length=8192)
"""What a file of Llama 3 has as `rope_freqs.weight`, the factor apart; it has no other trace of it."""


def config(source: Source) -> language.Config:
    """Raises a `UserError` for what the decoder cannot express, by its name in the file."""
    told = source.config
    kind = told["general.architecture"]

    def value(name: str, default: Any = None) -> Any:
        found = told.get(f"{kind}.{name}", default)
        if found is None:
            raise UserError(f"{source.path} lacks {kind}.{name}: fetch it again")
        return found

    for name, only in (("rope.scaling.type", "none"), ("expert_count", 0), ("attention.sliding_window", 0)):
        if (found := value(name, only)) != only:
            raise UserError(f"{kind}.{name} in {source.path} is {found!r}, which the decoder cannot express")
    vocab_size = source.tensors.shape("token_embd.weight")[0] if "token_embd.weight" in source.tensors else 0
    if vocab_size != len(told.get("tokenizer.ggml.tokens", ())):
        raise UserError(f"{source.path} has a tokenizer of another vocabulary than its table of {vocab_size} tokens")
    heads = value("attention.head_count")
    head_width = value("attention.key_length", value("embedding_length") // heads)
    if value("rope.dimension_count", head_width) != head_width:
        raise UserError(f"{kind}.rope.dimension_count in {source.path} is not {head_width}, all of a head's features")
    decoder = DecoderConfig(
        width=value("embedding_length"),
        depth=value("block_count"),
        heads=heads,
        kv_heads=value("attention.head_count_kv", heads),
        head_width=head_width,
        mlp=value("feed_forward_length"),
        rope_base=shortest(value("rope.freq_base", 10_000.0)),
        qkv_bias=kind == "qwen2",
        qk_norm="rms" if kind == "qwen3" else "none",
        norm_eps=shortest(value("attention.layer_norm_rms_epsilon")),
    )
    return language.Config(
        vocab_size=vocab_size,
        context_length=value("context_length"),
        eos_id=tokenizer(source).eos_id,
        tied="output.weight" not in source.tensors,
        decoder=scaled(decoder, source),
    )


def shortest(value: float) -> float:
    """A float32 as the number that was meant: 1e-5, which it is nearest to, and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def scaled(decoder: DecoderConfig, source: Source) -> DecoderConfig:
    """With the scaling that `rope_freqs.weight` holds the divisors of.

    Raises:
      UserError: they are not Llama 3's.
    """
    if "rope_freqs.weight" not in source.tensors:
        return decoder
    divisors = source.tensors["rope_freqs.weight"]
    found = replace(decoder, rope_scaling=replace(LLAMA_3, factor=shortest(divisors.max())))
    expected = np.divide(rotary_frequencies(decoder), rotary_frequencies(found))
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"rope_freqs.weight in {source.path} is not Llama 3's scaling, which alone the decoder has")
    return found


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """[heads * d, ...]: of each head, features 0, 2, ... before 1, 3, ...: llama.cpp's pairs as halves."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def entries(config: language.Config) -> Iterator[Entry]:
    d = config.decoder
    permutes = not d.qkv_bias and d.qk_norm == "none"

    def linear(path: str, key: str, heads: int = 0, *, bias: bool = False) -> Iterator[Entry]:
        if permutes and heads:
            read, write = partial(unpermuted, heads=heads), partial(permuted, heads=heads)
            yield Entry(f"{path}/kernel", f"{key}.weight", lambda w: read(w).T, lambda w: write(w.T))
        else:
            yield Entry(f"{path}/kernel", f"{key}.weight", np.transpose, np.transpose)
        if bias:
            yield Entry(f"{path}/bias", f"{key}.bias")

    yield Entry("token/embedding", "token_embd.weight")
    if not config.tied:
        yield Entry("head/embedding", "output.weight")
    yield Entry("decoder/final_norm/scale", "output_norm.weight")
    for i in range(d.depth):
        block, layer = f"decoder/block_{i}", f"blk.{i}"
        yield Entry(f"{block}/attention_norm/scale", f"{layer}.attn_norm.weight")
        yield from linear(f"{block}/attention/query", f"{layer}.attn_q", d.heads, bias=d.qkv_bias)
        yield from linear(f"{block}/attention/key", f"{layer}.attn_k", d.kv_heads, bias=d.qkv_bias)
        yield from linear(f"{block}/attention/value", f"{layer}.attn_v", bias=d.qkv_bias)
        yield from linear(f"{block}/attention/out", f"{layer}.attn_output")
        if d.qk_norm == "rms":
            yield Entry(f"{block}/attention/query_norm/scale", f"{layer}.attn_q_norm.weight")
            yield Entry(f"{block}/attention/key_norm/scale", f"{layer}.attn_k_norm.weight")
        yield Entry(f"{block}/mlp_norm/scale", f"{layer}.ffn_norm.weight")
        for name in ("gate", "up", "down"):
            yield from linear(f"{block}/mlp/{name}", f"{layer}.ffn_{name}")


def tokenizer(source: Source) -> Tokenizer:
    return tokenizer_of(source.config, source.path)


LAYOUT = Layout(
    name="llama-gguf",
    family="language",
    recognises=lambda source: source.config.get("general.architecture") in KINDS,
    config=config,
    entries=entries,
    fields=lambda source: text_fields(tokenizer(source)),
    tokenizer=tokenizer,
    idle=(r"rope_freqs\.weight",),
)
