"""The decoding loop: what each step is fed, and the randomness that it draws with."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.contract import abstract_batch
from vlm_jax.models import autoregressive, build, pixelcnn, tarflow
from vlm_jax.nn.transformer import Transformer
from vlm_jax.sampling.autoregressive import decode

LENGTH = 5
KEY = jax.random.key(0)
FIRST = np.array([[7, 1], [2, 9], [4, 4]])


def step(total: jax.Array, token: jax.Array, position: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A model whose cache is the sum of all tokens fed so far."""
    total = total + token
    return total, total + 10 * position + jax.random.randint(key, token.shape, 0, 10)


def test_each_step_gets_the_cache_and_token_before_it_its_position_and_its_own_key():
    total, token, expected = np.zeros_like(FIRST), FIRST, []
    for position in range(LENGTH):
        total = total + token
        token = total + 10 * position + jax.random.randint(jax.random.fold_in(KEY, position), FIRST.shape, 0, 10)
        expected.append(token)
    tokens = jax.jit(lambda first: decode(step, jnp.zeros_like(first), first, LENGTH, KEY))(FIRST)
    assert tokens.shape == (3, LENGTH, 2)
    np.testing.assert_array_equal(tokens, np.stack(expected, axis=1))


def test_a_shorter_decoding_is_the_beginning_of_a_longer_one():
    shorter, longer = (jax.jit(lambda n=n: decode(step, jnp.zeros(3, int), jnp.ones(3, int), n, KEY))() for n in (2, 5))
    np.testing.assert_array_equal(shorter, longer[:, :2])


def test_a_decoding_that_starts_later_is_the_end_of_the_whole_one():
    """Given what the cache and the token before it held there."""
    tokens = jax.jit(lambda: decode(step, jnp.zeros_like(FIRST), jnp.asarray(FIRST), LENGTH, KEY))()
    cache = FIRST + tokens[:, 0]  # all that was fed before the token at position 1
    rest = jax.jit(lambda: decode(step, cache, tokens[:, 1], LENGTH, KEY, start=2))()
    np.testing.assert_array_equal(rest, tokens[:, 2:])


DEPTH = 7  # of no other dimension below
IMAGES = {"image_size": 4, "channels": 1, "levels": 5}
STACK = Transformer(width=8, depth=DEPTH, heads=2, mlp=16)


def loops(jaxpr: Any) -> Iterator[Any]:
    """Every `scan` in a program that has none within it."""
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = [value for value in inner if hasattr(value, "eqns")]
        found = [loop for value in inner for loop in loops(value)]
        yield from found
        if equation.primitive.name == "scan" and not found:
            yield equation


@pytest.mark.parametrize(
    "config",
    [
        autoregressive.Config(**IMAGES, transformer=STACK),
        pixelcnn.Config(**IMAGES, width=8, depth=DEPTH),
        tarflow.Config(**IMAGES, blocks=2, transformer=STACK),
    ],
    ids=lambda config: type(config).__module__.split(".")[-1],
)
def test_no_step_takes_the_layers_apart_or_puts_their_caches_together(config: Any):
    """Which would copy all parameters and all that is cached for each token: nothing in the loop has them in one."""
    model = build(config)
    variables = jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 2))
    program = jax.make_jaxpr(lambda variables: model.sample(variables, KEY, {}, num=2))(variables)
    innermost = list(loops(program.jaxpr))
    assert innermost
    for loop in innermost:
        assert loop.params["length"] != DEPTH
        arrays = [*loop.invars, *(x for step in loop.params["jaxpr"].jaxpr.eqns for x in (*step.invars, *step.outvars))]
        assert not any(x.aval.shape[:1] == (DEPTH,) for x in arrays)
