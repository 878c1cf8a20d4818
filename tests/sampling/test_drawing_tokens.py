"""Drawing one token: frequencies beside probabilities in closed form, and rows that end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.sampling.autoregressive import decode, draw_token, ending

PROBS = np.array([0.05, 0.4, 0.05, 0.3, 0.2])
LOGITS = np.float32(np.log(PROBS) + 7)
DRAWS = 20_000
KEY = jax.random.key(0)


def sharpened(temperature: float) -> np.ndarray:
    return PROBS ** (1 / temperature) / (PROBS ** (1 / temperature)).sum()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, sharpened(0.5)),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 4}, np.array([5, 40, 0, 30, 20]) / 95),  # of two equally likely tokens the lower
        ({"top_k": 9}, PROBS),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.71}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),  # the token over the edge is in
        ({"top_p": 0.92}, np.array([5, 40, 0, 30, 20]) / 95),
        ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7, 0]),  # 0.4 + 0.3 are 78% of the three
        ({"temperature": 2.0, "top_p": 0.5}, sharpened(2.0) * [0, 1, 0, 1, 0]),
        ({"allowed": [True, False, True, True, False]}, [1 / 8, 0, 1 / 8, 6 / 8, 0]),
        ({"allowed": [True, False, True, True, True], "top_k": 1}, [0, 0, 0, 1, 0]),
        ({"allowed": [True, False, True, False, False], "top_p": 0.9}, [1 / 2, 0, 1 / 2, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0, "allowed": [True, False, True, False, False]}, [1, 0, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_probabilities_say(settings: dict[str, Any], expected: Any):
    expected = np.asarray(expected) / np.sum(expected)
    if "allowed" in settings:
        settings = settings | {"allowed": np.array(settings["allowed"])}
    drawn = jax.jit(lambda key: draw_token(key, jnp.broadcast_to(LOGITS, (DRAWS, 5)), **settings))(KEY)
    assert drawn.dtype == jnp.int32
    shares = np.bincount(drawn, minlength=5) / DRAWS
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    np.testing.assert_array_less(np.abs(shares - expected), 4.5 * error + 1e-9)


def test_without_limits_it_is_the_plain_draw_and_of_one_token_the_likeliest():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 7)), jnp.bfloat16)
    plain = jax.random.categorical(KEY, logits.astype(jnp.float32) / 0.7)
    everything = np.ones(7, bool)
    np.testing.assert_array_equal(draw_token(KEY, logits, temperature=0.7, top_p=1.0, allowed=everything), plain)
    greedy = draw_token(KEY, logits, temperature=0)
    np.testing.assert_array_equal(greedy, jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(draw_token(KEY, logits, top_k=1), greedy)


def test_each_row_has_its_own_nucleus():
    logits = np.log([[0.97, 0.01, 0.02], [0.3, 0.3, 0.4]])
    drawn = jax.vmap(lambda key: draw_token(key, jnp.asarray(logits), top_p=0.9))(jax.random.split(KEY, 200))
    assert [set(row) for row in np.asarray(drawn).T.tolist()] == [{0}, {0, 1, 2}]


END = 9


def test_what_follows_the_end_is_the_end_and_other_rows_go_on():
    """A model that counts up from what it is fed."""

    def step(cache: jax.Array, token: jax.Array, position: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cache + token, (token + 1) % 12

    first = jnp.array([4, 7, END, 0])
    carry = (jnp.zeros(4, jnp.int32), jnp.zeros(4, bool))
    tokens = jax.jit(lambda: decode(ending(step, END), carry, first, 5, KEY))()
    expected = [
        [5, 6, 7, 8, 9],
        [8, 9, 9, 9, 9],
        [10, 11, 0, 1, 2],  # what was there before the first draw ends nothing
        [1, 2, 3, 4, 5],
    ]
    np.testing.assert_array_equal(tokens, expected)
