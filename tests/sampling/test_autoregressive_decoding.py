"""The decoding loop: what each step is fed, and the randomness that it draws with."""

import jax
import jax.numpy as jnp
import numpy as np

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
