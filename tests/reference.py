"""Layers in NumPy and float64, as their papers write them, for the modules to be compared with.

Each takes the parameters of the linen module of its name, and the settings that the module's own config holds.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import scipy.special

ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x * scipy.special.expit(1.702 * x),
}


def random_params(shapes: Any, scale: float = 0.5, seed: int = 0) -> Any:
    """Values in float32 for the leaves of an abstract tree, so that no parameter hides another."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * random.normal(size=leaf.shape)).astype(np.float32), shapes)


def silu(x: np.ndarray) -> np.ndarray:
    return x * scipy.special.expit(x)


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(x))


def dense(params: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64) @ params["kernel"] + params.get("bias", 0.0)


def conv(params: Any, x: np.ndarray, stride: int = 1) -> np.ndarray:
    """With zeros around, as many as keep the size; of a stride of 2, none before and one after (XLA's SAME)."""
    kernel = np.asarray(params["kernel"], np.float64)
    rows, columns = kernel.shape[:2]
    before = [(size - 1) // 2 if stride == 1 else 0 for size in (rows, columns)]
    after = [size - 1 - first for size, first in zip((rows, columns), before, strict=True)]
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), *zip(before, after, strict=True), (0, 0)))
    height, width = x.shape[1], x.shape[2]
    y = sum(
        padded[:, i : i + height : stride, j : j + width : stride] @ kernel[i, j]
        for i in range(rows)
        for j in range(columns)
    )
    return y + params.get("bias", 0.0)


def layer_norm(params: Any, x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + eps)
    return y * params.get("scale", 1.0) + params.get("bias", 0.0)


def rms_norm(params: Any, x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * params["scale"]


def group_norm(params: Any, x: np.ndarray, groups: int, eps: float = 1e-6) -> np.ndarray:
    split = np.asarray(x, np.float64).reshape(*x.shape[:3], groups, -1)
    centred = split - split.mean(axis=(1, 2, 4), keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(axis=(1, 2, 4), keepdims=True) + eps)
    return y.reshape(x.shape) * params["scale"] + params["bias"]


def attention(
    params: Any, x: np.ndarray, context: np.ndarray, heads: int, mask: np.ndarray | bool = True, temperature: float = 1
) -> np.ndarray:
    """1706.03762, section 3.2, head by head; the temperature divides its logits."""
    query, key, value = (
        np.split(dense(params[name], inputs), heads, axis=-1)
        for name, inputs in (("query", x), ("key", context), ("value", context))
    )
    outputs = []
    for q, k, v in zip(query, key, value, strict=True):
        logits = np.where(mask, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) / temperature, -np.inf)
        outputs.append(scipy.special.softmax(logits, axis=-1) @ v)
    return dense(params["out"], np.concatenate(outputs, axis=-1))


def mlp(params: Any, x: np.ndarray, activation: str) -> np.ndarray:
    return dense(params["down"], ACTIVATIONS[activation](dense(params["up"], x)))


def transformer(params: Any, x: np.ndarray, config: Any, *, causal: bool = False, temperature: float = 1) -> np.ndarray:
    """A stack of pre-norm blocks, unrolled, and the final norm, where there is one."""
    mask = np.tri(x.shape[1], dtype=bool) if causal else True
    for i in range(config.depth):
        block = params[f"block_{i}"]
        y = layer_norm(block["attention_norm"], x, config.norm_eps)
        x = x + attention(block["attention"], y, y, config.heads, mask, temperature)
        x = x + mlp(block["mlp"], layer_norm(block["mlp_norm"], x, config.norm_eps), config.activation)
    return layer_norm(params["final_norm"], x, config.norm_eps) if "final_norm" in params else x


def rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """2104.09864, equation 12: features i and i + d / 2 of [B, T, d] as a complex number, which is turned."""
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * np.exp(1j * positions[..., None] * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def rotary_attention(
    params: Any, x: np.ndarray, positions: np.ndarray, mask: np.ndarray, config: Any, frequencies: np.ndarray
) -> np.ndarray:
    """Head by head, of which neighbouring ones share a key and a value (2305.13245); `mask` is [B, T, S]."""

    def head(name: str, h: int, count: int) -> np.ndarray:
        y, norm = np.split(dense(params[name], x), count, axis=-1)[h], params.get(f"{name}_norm", {})
        if config.qk_norm == "rms":
            y = rms_norm(norm, y, config.norm_eps)
        if config.qk_norm == "layer":
            y = layer_norm({name: value[h] for name, value in norm.items()}, y, config.norm_eps)
        return rotate(y, positions, frequencies)

    outputs = []
    for h in range(config.heads):
        shared = h // (config.heads // config.kv_heads)
        query, key = head("query", h, config.heads), head("key", shared, config.kv_heads)
        value = np.split(dense(params["value"], x), config.kv_heads, axis=-1)[shared]
        logits = np.where(mask, query @ key.swapaxes(1, 2) / np.sqrt(config.head_width), -np.inf)
        outputs.append(scipy.special.softmax(logits, axis=-1) @ value)
    return dense(params["out"], np.concatenate(outputs, axis=-1))


def decoder(
    params: Any, x: np.ndarray, positions: np.ndarray, mask: np.ndarray, config: Any, frequencies: np.ndarray
) -> np.ndarray:
    """Llama's blocks (2302.13971), unrolled, and the final norm."""
    for i in range(config.depth):
        block = params[f"block_{i}"]
        y = rms_norm(block["attention_norm"], x, config.norm_eps)
        x = x + rotary_attention(block["attention"], y, positions, mask, config, frequencies)
        y, mlp = rms_norm(block["mlp_norm"], x, config.norm_eps), block["mlp"]
        x = x + dense(mlp["down"], silu(dense(mlp["gate"], y)) * dense(mlp["up"], y))
    return rms_norm(params["final_norm"], x, config.norm_eps)


def attention_pool(params: Any, x: np.ndarray, config: Any) -> np.ndarray:
    """2106.04560's: a probe attends to the sequence, and a residual MLP follows."""
    probe = np.broadcast_to(params["probe"], (len(x), 1, config.width))
    pooled = attention(params["attention"], probe, x, config.heads)
    y = layer_norm(params["mlp_norm"], pooled, config.norm_eps)
    return (pooled + mlp(params["mlp"], y, config.activation))[:, 0]
