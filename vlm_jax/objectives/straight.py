"""The straight path from data to noise (2209.03003): its times, what a network says of it, and what that costs."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.objectives.diffusion import rectified_flow, spread, stratified, sum_squares

CLAMP = 0.05
"""The least share of noise, or of data, by which a velocity is computed from a prediction of the data, or the noise
(2511.13720, its release)."""


class StraightPath(NamedTuple):
    """x_t = (1 - t) x + t eps; t is the share of noise."""

    predict: Literal["velocity", "x", "eps"] = "velocity"
    """What the network gives: the velocity eps - x, or the data or the noise, from which the velocity follows."""
    logit_normal: tuple[float, float] | None = None
    """Mean and deviation of logit(t) in training, before the shift; None: t is uniform."""
    shift: float = 1.0

    def shifted(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """2403.03206, equation 23."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def drawn_times(self, key: Array, count: int) -> Float[Array, " count"]:
        """Of training, all together evenly spread."""
        t = stratified(key, count)
        if self.logit_normal is not None:
            mean, deviation = self.logit_normal
            t = jax.nn.sigmoid(mean + deviation * jax.scipy.special.ndtri(jnp.clip(t, 1e-6, 1 - 1e-6)))
        return self.shifted(t)

    def noisy(self, x: Float[Array, "B H W C"], t: Float[Array, " B"], eps: Float[Array, "B H W C"]) -> Array:
        """x_t."""
        alpha, sigma = rectified_flow(spread(t, x))
        return alpha * x + sigma * eps

    def velocity(
        self, output: Float[Array, "B H W C"], x_t: Float[Array, "B H W C"], t: Float[Array, " B"]
    ) -> Float[Array, "B H W C"]:
        """From the data to the noise, not without bound where next to none is left of what is not predicted."""
        t = spread(t, x_t)
        if self.predict == "x":
            return (x_t - output) / jnp.maximum(t, CLAMP)
        return output if self.predict == "velocity" else (output - x_t) / jnp.maximum(1 - t, CLAMP)

    def data(
        self, output: Float[Array, "B H W C"], x_t: Float[Array, "B H W C"], t: Float[Array, " B"]
    ) -> Float[Array, "B H W C"]:
        """The prediction of x, to which the velocity leads."""
        return x_t - spread(t, x_t) * self.velocity(output, x_t, t)

    def squared_error(
        self,
        output: Float[Array, "B H W C"],
        x: Float[Array, "B H W C"],
        x_t: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        eps: Float[Array, "B H W C"],
    ) -> Float[Array, "B H W C"]:
        """Of the velocity, that of the data by the same clamp as the network's."""
        wanted = self.velocity({"velocity": eps - x, "x": x, "eps": eps}[self.predict], x_t, t)
        return jnp.square(self.velocity(output, x_t, t) - wanted)


def log_snr_time(log_snr: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The share of noise t at which 2 ln((1 - t) / t) is `log_snr`."""
    return jax.nn.sigmoid(-0.5 * log_snr)


def log_snr_divergence(
    x: Float[Array, "B ..."], data: Float[Array, "B ..."], log_snr: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Nats a unit of log SNR that a prediction of x costs: 1/2 SNR |x - data|^2, summed (2107.00630, equation 13)."""
    return 0.5 * jnp.exp(log_snr) * sum_squares(x - data)


def noise_divergence(x: Float[Array, "B ..."], log_snr: float) -> Float[Array, " B"]:
    """KL(q(x_t | x) || N(0, t^2)), of what is left of the data where the path ends at `log_snr`."""
    return 0.5 * jnp.exp(log_snr) * sum_squares(x)
