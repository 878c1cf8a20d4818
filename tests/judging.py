"""A judge and a painter, without parameters: what one sees and reads, and the other paints, is told beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.contract import Input, Model
from vlm_jax.data import train_tokenizer
from vlm_jax.evals import Judge

TOKENIZER = train_tokenizer(["red green blue cat dog bird tree house moon"], 320)
CONTEXT = 12


def looked_up(value: jax.Array, known: np.ndarray, found: np.ndarray) -> jax.Array:
    """For each row that which is found for the known one that is equal to it; zeros where none is."""
    rows, table = value.reshape(len(value), 1, -1), jnp.asarray(known).reshape(len(known), -1)
    equal = jnp.all(rows == table, axis=-1)
    chosen = jnp.asarray(found)[jnp.argmax(equal, axis=1)]
    return jnp.where(equal.any(axis=1).reshape(-1, *[1] * (chosen.ndim - 1)), chosen, jnp.zeros_like(chosen))


def judge(
    pictures: np.ndarray, seen: np.ndarray, captions: Sequence[str], read: np.ndarray, name: str = "judge"
) -> Judge:
    """One to whom each of the pictures [K, H, W, C] is a vector of `seen`, and each caption one of `read`."""
    inputs = {"image": Input(pictures.shape[1:], "uint8", 256), "tokens": Input((CONTEXT,), "int32", 320)}
    tokens = TOKENIZER.encode(captions, CONTEXT)
    model = Model(
        inputs=inputs,
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        embed_image=lambda _, image: looked_up(image, pictures, np.float32(seen)),
        embed_text=lambda _, text: looked_up(text, tokens, np.float32(read)),
    )
    return Judge(model, {}, TOKENIZER, name)


@dataclass(frozen=True)
class Sampling:
    """Of a painter."""

    brighter: int = 0


def painter(captions: Sequence[str], pictures: np.ndarray) -> Model:
    """One that paints its picture of each caption, and black of any other text."""
    tokens = TOKENIZER.encode(captions, CONTEXT)

    def sample(_: Any, key: Any, given: Any, *, num: int, temperature: float, sampling: Sampling) -> jax.Array:
        assert len(given["tokens"]) == num
        return looked_up(given["tokens"], tokens, pictures) + jnp.uint8(sampling.brighter)

    spec = Input((CONTEXT,), "int32", 320, contains=TOKENIZER.eos_id)
    return Model(
        inputs={"image": Input(pictures.shape[1:], "uint8", 256), "tokens": spec},
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        conditions={"tokens": spec},
        sampling=Sampling(),
        sample=sample,
    )
