"""Judges and painters, without parameters: what the ones see and read, and the others paint, is told beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.contract import Input, Model
from vlm_jax.data import train_tokenizer
from vlm_jax.evals import Judge, Pictures, Subject

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


def corner(_: Any, image: jax.Array) -> jax.Array:
    """The levels of the first pixel."""
    return image[:, 0, 0].astype(jnp.float32)


def seeing(
    size: int,
    channels: int,
    limit: int,
    look: Any = corner,
    name: str = "judge",
    *,
    features: bool = False,
    fid: bool = False,
) -> Judge:
    """One that looks at images, and reads nothing; of `features` it has two of each image, whose mean that is."""

    def parts(variables: Any, image: jax.Array) -> jax.Array:
        seen = look(variables, image)
        return jnp.stack([seen - 1, seen + 1], axis=1)

    sees: dict[str, Any] = {"image_features": parts} if features else {"embed_image": look}
    inputs = {"image": Input((size, size, channels), "uint8", limit)}
    model = Model(inputs=inputs, init=lambda *_: {}, loss=lambda *_, **__: None, rules=(), **sees)
    return Judge(model, {}, name=name, fid=fid)


def sampler(images: np.ndarray, value: int, valid: int = 0) -> Subject:
    """A model all of whose samples have one value, beside images of 2x2 pixels, and the first of them again."""

    def sample(_: Any, key: jax.Array, given: Any, *, num: int, temperature: float, sampling: Any) -> jax.Array:
        return jnp.full((num, 2, 2, 1), value + sampling.brighter, jnp.uint8)

    inputs = {"image": Input((2, 2, 1), "uint8", 256)}
    return Subject(
        model=Model(
            inputs=inputs,
            init=lambda *_: {},
            loss=lambda *_, **__: None,
            rules=(),
            sampling=Sampling(),
            sample=sample,
        ),
        variables={},
        batches=lambda: iter(()),
        examples=len(images) + valid,
        pictures=Pictures(levels=256, held_out=lambda: iter([images, images[:valid]][: 1 + (valid > 0)])),
        judges=(seeing(2, 1, 256),),
    )
