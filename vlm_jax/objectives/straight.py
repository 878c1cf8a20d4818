"""The straight path from data to noise (2209.03003): its times, what a network says of it, and what that costs."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.objectives.diffusion import (
    Level,
    level_log_prob,
    rectified_flow,
    spread,
    stratified,
    sum_squares,
    variance_preserving,
)

CLAMP = 0.05
"""The least share of noise, or of data, by which a velocity is computed from a prediction of the data, or the noise
(2511.13720, its release)."""
LOG_SNR = (-14.0, 13.3)
"""Of the bound: at the first a millionth of the data is left, at the second the noise is a sixth of a step between two
of 256 levels (VDM's last, 2107.00630)."""


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

    def even_times(self, key: Array, count: int) -> Float[Array, " count"]:
        """Of which the log SNR is uniform over all that the bound has."""
        return time_of(LOG_SNR[0] + (LOG_SNR[1] - LOG_SNR[0]) * stratified(key, count))

    def time(self, t: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """What a network is told of it: 0 to 1000."""
        return 1000 * t

    def level(self, t: Float[Array, "*B"]) -> Level:
        """alpha and sigma."""
        return rectified_flow(t)

    def solved_times(self, steps: int) -> Float[Array, " N"]:
        """From noise to data, of so many steps of a solver."""
        return self.shifted(jnp.linspace(1.0, 0.0, steps + 1))

    def noisy(self, x: Float[Array, "B H W C"], t: Float[Array, " B"], eps: Float[Array, "B H W C"]) -> Array:
        """x_t."""
        alpha, sigma = self.level(spread(t, x))
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
        eps: Float[Array, "B H W C"],
        t: Float[Array, " B"],
    ) -> Float[Array, "B H W C"]:
        """Of the velocity, that of the data by the same clamp as the network's."""
        x_t = self.noisy(x, t, eps)
        wanted = self.velocity({"velocity": eps - x, "x": x, "eps": eps}[self.predict], x_t, t)
        return jnp.square(self.velocity(output, x_t, t) - wanted)

    def bound(
        self,
        predict: Callable[[Array, Array], Array],
        x: Float[Array, "B H W C"],
        image: Int[Array, "B H W C"],
        levels: int,
        key: Array,
    ) -> Float[Array, " B"]:
        """Nats of -log p(image), in expectation at most (2107.00630, equation 11).

        Args:
          predict: `(x_t, t) -> x`, as `data` has it.
          x: the levels of `image` on [-1, 1].
        """
        path_key, last_key = jax.random.split(key)
        gamma = jnp.float32(-LOG_SNR[1])
        x_0 = x + jnp.exp(0.5 * gamma) * jax.random.normal(last_key, x.shape)
        last = level_log_prob(x_0 * variance_preserving(gamma).alpha, gamma, image, levels)
        return self.divergence(predict, x, path_key) - last

    def divergence(
        self, predict: Callable[[Array, Array], Array], x: Float[Array, "B H W C"], key: Array
    ) -> Float[Array, " B"]:
        """Nats of all that the path tells of x, in expectation, at one log SNR for all of them.

        KL(q(x_t | x) || N(0, t^2)) where it begins, and the integral of 1/2 SNR |x - predict|^2 over log SNR.
        """
        time_key, noise_key = jax.random.split(key)
        first, last = LOG_SNR
        t = self.even_times(time_key, len(x))
        snr = jnp.square((1 - t) / t)
        x_t = self.noisy(x, t, jax.random.normal(noise_key, x.shape))
        slope = 0.5 * snr * sum_squares(x - predict(x_t, t))
        return 0.5 * jnp.exp(first) * sum_squares(x) + (last - first) * slope


def time_of(log_snr: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The share of noise t at which 2 ln((1 - t) / t) is `log_snr`."""
    return jax.nn.sigmoid(-0.5 * log_snr)
