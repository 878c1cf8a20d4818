"""What signatures say of arrays is checked wherever these tests call the library."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, Int, TypeCheckError, jaxtyped

from shapes import arrays
from vlm_jax.nn.sequence import next_tokens, positions
from vlm_jax.objectives.contrastive import info_nce
from vlm_jax.sampling.autoregressive import draw_token

checked = jaxtyped(typechecker=arrays)


class Pair(NamedTuple):
    left: Float[Array, "B T"]
    right: Float[Array, "B T"]


@checked
def repeated(x: Float[Array, "B D"], times: int) -> tuple[Float[Array, "B D"], ...]:
    return (x,) * times + (x[:1],)


@checked
def narrow(pair: Pair, image: Int[Array, "B T"]) -> Pair | None:
    return pair._replace(right=pair.right[:, :1]) if image[0, 0] else None


@pytest.mark.parametrize(
    ("function", "given", "named"),
    [
        (positions, (jnp.zeros(3, jnp.int32),), "segment"),
        (positions, (jnp.zeros((2, 3)),), "segment"),
        (next_tokens, (jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 4), bool), jnp.ones((2, 3), jnp.int32)), "target"),
        (info_nce, (jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.float32(1)), "text"),
        (draw_token, (None, jnp.ones((2, 3), jnp.int32)), "logits"),
        (narrow, (Pair(jnp.ones((2, 3)), jnp.ones((2, 4))), jnp.ones((2, 3), jnp.uint8)), "pair"),
    ],
)
def test_a_wrong_array_is_refused_by_its_name(function: Callable[..., object], given: tuple[object, ...], named: str):
    with pytest.raises(TypeCheckError, match=rf"typechecking parameter '{named}'"):
        function(*given)


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (repeated, (jnp.ones((2, 3)), 2)),
        (narrow, (Pair(jnp.ones((2, 3)), jnp.ones((2, 3))), jnp.ones((2, 3), jnp.uint8))),
    ],
)
def test_a_wrong_array_is_not_returned(function: Callable[..., object], given: tuple[object, ...]):
    with pytest.raises(TypeCheckError, match="checking the return value"):
        function(*given)
