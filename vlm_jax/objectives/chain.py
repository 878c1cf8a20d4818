"""The chain of DDPM (2006.11239): noise in discrete steps, what a network says of them, and what undoing each costs."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from vlm_jax.objectives.diffusion import (
    Level,
    discretised_gaussian_log_prob,
    divergence_of_gaussians,
    posterior,
    prior_divergence,
    spread,
    stratified,
    to_data,
    variance_preserving,
)
from vlm_jax.objectives.likelihood import gaussian_log_density


class Prediction(NamedTuple):
    """What the network says of a noisy image."""

    output: Float[Array, "B H W C"]
    """Of the kind that it predicts."""
    data: Float[Array, "B H W C"]
    mix: Float[Array, "B H W C"] | float
    """Where the log-variance of the step lies between the posterior's (0) and the forward step's (1)."""


class Chain(NamedTuple):
    """Steps 1 to T of noise, of images of integers or real vectors. Step 0 is the data."""

    gammas: Float[Array, " T"]
    """-log SNR after each step."""
    predict: Literal["eps", "x", "v"]
    variance: Literal["posterior", "forward", "learned"] = "posterior"
    levels: int | None = None
    """Of a sub-pixel; None: real vectors."""
    clip: float | None = None
    """The largest number of the data: what the network says of them beyond it is surely wrong. None: not known."""

    @property
    def steps(self) -> int:
        return len(self.gammas)

    def drawn_times(self, key: Array, count: int) -> Int[Array, " count"]:
        """Each alike, all together evenly spread."""
        t = 1 + jnp.floor(self.steps * stratified(key, count)).astype(jnp.int32)
        return jnp.minimum(t, self.steps)  # a product of floats may round up

    def drawn_terms(self, key: Array, count: int) -> tuple[Int[Array, " count"], Float[Array, " count"]]:
        """Steps from 2 on, of which one stands for all of them in the bound, and their probabilities.

        Costs fall about as 1/t (2102.09672, figure 2): steps drawn in that proportion, and their costs divided by it,
        have the same expectation as steps drawn alike and far less variance.
        """
        span = math.log((self.steps + 1) / 2)
        t = jnp.floor(2 * jnp.exp(span * stratified(key, count))).astype(jnp.int32)
        t = jnp.minimum(t, self.steps)  # a product of floats may round up
        return t, jnp.log1p(1 / t) / span

    def level(self, t: Int[Array, "*B"]) -> Level:
        """From step 0 on, at which there is no noise."""
        alpha, sigma = variance_preserving(self.gammas)
        alpha, sigma = jnp.concatenate([jnp.ones(1), alpha]), jnp.concatenate([jnp.zeros(1), sigma])
        return Level(alpha[t], sigma[t])

    def solved_times(self, steps: int) -> Int[Array, " N"]:
        """From noise to data, of so many steps of a solver."""
        return jnp.round(jnp.linspace(self.steps, 0, steps + 1)).astype(jnp.int32)

    def noisy(self, x: Float[Array, "B H W C"], t: Int[Array, " B"], eps: Float[Array, "B H W C"]) -> Array:
        """x_t."""
        alpha, sigma = (spread(each, x) for each in self.level(t))
        return alpha * x + sigma * eps

    def time(self, t: Int[Array, "*B"]) -> Float[Array, "*B"]:
        """What a network is told of the step: 0 to 1000, the first at 0."""
        return (t - 1) * (1000 / self.steps)

    def prediction(
        self, output: Float[Array, "B H W O"], x_t: Float[Array, "B H W C"], t: Int[Array, "*B"]
    ) -> Prediction:
        """Of a network's output, which of a learned variance has twice the channels. Steps count from 1."""
        mix: Array | float = 1.0 if self.variance == "forward" else 0.0
        if self.variance == "learned":
            output, fraction = jnp.split(output, 2, axis=-1)
            mix = (fraction + 1) / 2
        level = Level(*(spread(jnp.broadcast_to(each, (len(x_t),)), x_t) for each in self.level(t)))
        data = to_data(output, x_t, level, self.predict)
        return Prediction(output, data if self.clip is None else jnp.clip(data, -self.clip, self.clip), mix)

    def data(
        self, output: Float[Array, "B H W C"], x_t: Float[Array, "B H W C"], t: Int[Array, "*B"]
    ) -> Float[Array, "B H W C"]:
        """The prediction of x."""
        return self.prediction(output, x_t, t).data

    def squared_error(
        self,
        output: Float[Array, "B H W C"],
        x: Float[Array, "B H W C"],
        eps: Float[Array, "B H W C"],
        t: Int[Array, " B"],
    ) -> Float[Array, "B H W C"]:
        """Of what the network predicts."""
        alpha, sigma = (spread(each, x) for each in self.level(t))
        wanted = {"eps": eps, "x": x, "v": alpha * eps - sigma * x}[self.predict]
        return jnp.square(output - wanted)

    def step_cost(
        self,
        x: Float[Array, "B H W C"],
        x_t: Float[Array, "B H W C"],
        t: Int[Array, " B"],
        p: Prediction,
        image: Num[Array, "B H W C"],
    ) -> Float[Array, " B"]:
        """The term of the negative bound that belongs to the step from t to t - 1, nats.

        From 1 to 0 it is the levels' own cost, with the posterior variance of the step before, for its own is 0. There
        the forward variance is no larger, but the range of a learned one ends at beta_1: as in the authors' releases.

        Args:
          image: as the data have it: of levels the integers.
        """
        upper = spread(jnp.maximum(t, 2), x)
        true = posterior(x, x_t, self.gammas[upper - 2], self.gammas[upper - 1])
        model = posterior(p.data, x_t, self.gammas[upper - 2], self.gammas[upper - 1])
        first = spread(t, x) == 1
        end = jax.nn.log_sigmoid(self.gammas[0]) if self.variance == "learned" else true.log_variance
        forward = jnp.where(first, end, true.log_forward_variance)
        log_variance = p.mix * forward + (1 - p.mix) * true.log_variance
        divergence = divergence_of_gaussians(true.mean, true.log_variance, model.mean, log_variance)
        if self.levels is None:
            log_prob = gaussian_log_density(x, p.data, log_variance)
        else:
            log_prob = discretised_gaussian_log_prob(p.data, log_variance, image, self.levels)
        return jnp.sum(jnp.where(first, -log_prob, divergence), axis=(1, 2, 3))

    def bound(
        self,
        predict: Callable[[Array, Array], Prediction],
        x: Float[Array, "B H W C"],
        image: Num[Array, "B H W C"],
        key: Array,
    ) -> Float[Array, " B"]:
        """Nats of -log p(image), in expectation at most: the last step's cost, and one other's for all the others.

        Args:
          predict: `(x_t, t) -> Prediction`
        """
        time_key, noise_key, first_key = jax.random.split(key, 3)

        def cost(t: Int[Array, " B"], key: Array) -> Float[Array, " B"]:
            x_t = self.noisy(x, t, jax.random.normal(key, x.shape))
            return self.step_cost(x, x_t, t, predict(x_t, t), image)

        t, probability = self.drawn_terms(time_key, len(x))
        first = cost(jnp.ones_like(t), first_key)
        return prior_divergence(x, self.gammas[-1]) + cost(t, noise_key) / probability + first
