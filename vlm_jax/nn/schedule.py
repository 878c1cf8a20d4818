"""A noise schedule that is learned (Kingma et al. 2021, 2107.00630, appendix H)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STEPS = 1024


class MonotoneSchedule(nn.Module):
    """Time from 0 to 1 -> how far from the least noise to the most, and its derivative: a network that only rises.

    The paper's: a line and 1024 sigmoids, all weights of which are positive, less its value at 0 and over what it rises
    to 1. (The biases that this makes immaterial are left out.) It starts near the line; the sigmoids rise one after the
    other, so that each weight sets the slope around one time.
    """

    @nn.compact
    def __call__(self, t: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        line = jnp.abs(self.param("line", nn.initializers.ones, ()))
        gain = jnp.abs(self.param("gain", nn.initializers.constant(10.0), (STEPS,)))
        centre = self.param("centre", lambda _: jnp.linspace(0.0, 1.0, STEPS))
        weight = jnp.abs(self.param("weight", nn.initializers.ones, (STEPS,)))

        def rise(t: Array) -> Array:
            return line * t + jnp.mean(weight * jax.nn.sigmoid(gain * (t[..., None] - centre)), axis=-1)

        start, end = rise(jnp.zeros(())), rise(jnp.ones(()))
        step = jax.nn.sigmoid(gain * (t[..., None] - centre))
        slope = line + jnp.mean(weight * gain * step * (1 - step), axis=-1)
        return (rise(t) - start) / (end - start), slope / (end - start)


MONOTONE_SCHEDULE_RULES = (
    (r"schedule/line$", ()),
    (r"schedule/(gain|centre|weight)$", (None,)),
)
