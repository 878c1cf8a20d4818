"""Diffusion: how data become noise, what a network predicts of it, and the bounds and weights of its loss.

A noisy image is x_t = alpha x + sigma eps with standard normal eps. All functions are elementwise or per image, in
nats and fp32. -log SNR is gamma = log(sigma^2 / alpha^2).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from vlm_jax.objectives.likelihood import gaussian_kl, to_unit_range

Parameterisation = Literal["eps", "x", "v", "velocity"]
"""What a network predicts: the noise eps, the data x, v = alpha eps - sigma x (2202.00512), or eps - x (2209.03003)."""


class Level(NamedTuple):
    """A level of noise: x_t = alpha x + sigma eps."""

    alpha: Float[Array, "*B"]
    sigma: Float[Array, "*B"]


def spread(values: Num[Array, " B"], like: Num[Array, "B ..."]) -> Num[Array, "B ..."]:
    """One value an image, shaped to multiply images."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def stratified(key: Array, count: int) -> Float[Array, " count"]:
    """Numbers in [0, 1), each uniform, all together evenly spread: times whose losses have a mean of less variance.

    (2107.00630, appendix I)
    """
    return (jax.random.uniform(key) + jnp.arange(count) / count) % 1


# Schedules.


def variance_preserving(gamma: Float[Array, "*B"]) -> Level:
    """alpha^2 + sigma^2 = 1 at the -log SNR gamma (VDM, 2107.00630)."""
    return Level(jnp.sqrt(jax.nn.sigmoid(-gamma)), jnp.sqrt(jax.nn.sigmoid(gamma)))


def rectified_flow(t: Float[Array, "*B"]) -> Level:
    """The straight line from the data at t = 0 to the noise at t = 1 (2209.03003)."""
    return Level(1 - t, t)


def variance_exploding(t: Float[Array, "*B"]) -> Level:
    """The time is the deviation of the noise (EDM, 2206.00364)."""
    return Level(jnp.ones_like(t), t)


def linear_betas(steps: int) -> list[float]:
    """Variances that each step adds, from 1e-4 to 0.02 for 1000 steps (2006.11239); scaled for another number."""
    scale = 1000 / steps
    return [scale * (1e-4 + (0.02 - 1e-4) * i / max(steps - 1, 1)) for i in range(steps)]


def scaled_linear_betas(steps: int) -> list[float]:
    """Latent diffusion's and Stable Diffusion's: their roots are evenly spread, of 0.00085 to 0.012 (2112.10752)."""
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    return [(first + (last - first) * i / max(steps - 1, 1)) ** 2 for i in range(steps)]


def zero_terminal(betas: Sequence[float]) -> list[float]:
    """Betas whose last state is noise alone: alpha is shifted to end at 0 and scaled to begin as it did.

    (2305.08891, algorithm 1)
    """
    alphas = [math.exp(0.5 * total) for total in itertools.accumulate(math.log1p(-beta) for beta in betas)]
    first, last = alphas[0], alphas[-1]
    squares = [((alpha - last) * first / (first - last)) ** 2 for alpha in alphas]
    return [1 - after / before for before, after in itertools.pairwise([1.0, *squares])]


def cosine_betas(steps: int) -> list[float]:
    """Those that make alpha^2 the square of a cosine, at most 0.999 (2102.09672, equation 17)."""

    def signal(i: int) -> float:
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - signal(i + 1) / signal(i), 0.999) for i in range(steps)]


def discrete_gammas(betas: Sequence[float]) -> Float[Array, " T"]:
    """gamma after each step; the products of 1 - beta are taken in float64, where 1 - alpha^2 does not cancel.

    After a beta of 1 there is noise alone, and gamma is infinite.
    """
    gammas, log_signal = [], 0.0
    for beta in betas:
        log_signal += math.log1p(-beta) if beta < 1 else -math.inf
        gammas.append(math.log(-math.expm1(log_signal)) - log_signal)
    return jnp.array(gammas, jnp.float32)


# What a network predicts.


def to_data(
    output: Float[Array, "*B"], x_t: Float[Array, "*B"], level: Level, kind: Parameterisation
) -> Float[Array, "*B"]:
    """The prediction of x in a network's prediction of `kind`."""
    alpha, sigma = level
    match kind:
        case "eps":
            return (x_t - sigma * output) / alpha
        case "x":
            return output
        case "v":
            return (alpha * x_t - sigma * output) / (jnp.square(alpha) + jnp.square(sigma))
        case "velocity":
            return (x_t - sigma * output) / (alpha + sigma)


def from_data(
    data: Float[Array, "*B"], x_t: Float[Array, "*B"], level: Level, kind: Parameterisation
) -> Float[Array, "*B"]:
    """The inverse of `to_data`: with x itself, the target of a network that predicts `kind`."""
    alpha, sigma = level
    match kind:
        case "eps":
            return (x_t - alpha * data) / sigma
        case "x":
            return data
        case "v":
            return (alpha * x_t - (jnp.square(alpha) + jnp.square(sigma)) * data) / sigma
        case "velocity":
            return (x_t - (alpha + sigma) * data) / sigma


def data_gain(level: Level, kind: Parameterisation) -> Float[Array, "*B"]:
    """|d x / d output| of `to_data`: squared errors of a prediction times its square are those of x."""
    alpha, sigma = level
    match kind:
        case "eps":
            return sigma / alpha
        case "x":
            return jnp.ones_like(alpha)
        case "v":
            return sigma / (jnp.square(alpha) + jnp.square(sigma))
        case "velocity":
            return sigma / (alpha + sigma)


def min_snr_weight(level: Level, kind: Parameterisation, limit: float = 5.0) -> Float[Array, "*B"]:
    """Of the squared error of a prediction, which makes that of x weigh min(SNR, limit) (2303.09556)."""
    snr = jnp.square(level.alpha / level.sigma)
    return jnp.minimum(snr, limit) * jnp.square(data_gain(level, kind))


class Preconditioning(NamedTuple):
    """x = skip x_t + out F(into x_t, time), with what F sees and what it should give of unit variance (2206.00364)."""

    skip: Float[Array, "*B"]
    out: Float[Array, "*B"]
    into: Float[Array, "*B"]
    time: Float[Array, "*B"]
    weight: Float[Array, "*B"]
    """Of the squared error of x, which is then that of F."""


def edm_preconditioning(sigma: Float[Array, "*B"], data_deviation: float = 0.5) -> Preconditioning:
    """Table 1 of 2206.00364, for data of standard deviation `data_deviation`."""
    variance = jnp.square(sigma) + data_deviation**2
    out = sigma * data_deviation / jnp.sqrt(variance)
    return Preconditioning(
        data_deviation**2 / variance, out, 1 / jnp.sqrt(variance), jnp.log(sigma) / 4, 1 / jnp.square(out)
    )


# The variational bound, term by term. Images have batch axis B; x and eps of one shape.


def sum_squares(x: Float[Array, "B ..."]) -> Float[Array, " B"]:
    return jnp.sum(jnp.square(x.reshape(len(x), -1)), axis=-1)


def prior_divergence(x: Float[Array, "B ..."], gamma: Float[Array, ""]) -> Float[Array, " B"]:
    """KL(q(x_t | x) || N(0, 1)) at the last level of noise."""
    alpha, _ = variance_preserving(gamma)
    divergence = gaussian_kl(alpha * x, jnp.full_like(x, jax.nn.log_sigmoid(gamma)))
    return jnp.sum(divergence.reshape(len(x), -1), axis=-1)


def continuous_divergence(
    eps: Float[Array, "B ..."], eps_hat: Float[Array, "B ..."], slope: Float[Array, "*B"]
) -> Float[Array, " B"]:
    """Its mean over uniform t in [0, 1] is the diffusion term of infinitely many steps (2107.00630, equation 17).

    Args:
      slope: d gamma / dt at t.
    """
    return 0.5 * slope * sum_squares(eps - eps_hat)


def level_logits(x_t: Float[Array, "B ..."], gamma: Float[Array, ""], levels: int) -> Float[Array, "B ... V"]:
    """p(image | x_t): each sub-pixel by Bayes' rule from its own noisy value, all levels equally likely.

    (2107.00630, equation 12)
    """
    alpha, _ = variance_preserving(gamma)
    values = to_unit_range(jnp.arange(levels), levels)
    return -0.5 * jnp.exp(-gamma) * jnp.square(x_t[..., None] / alpha - values)


def level_log_prob(
    x_t: Float[Array, "B ..."], gamma: Float[Array, ""], image: Int[Array, "B ..."], levels: int
) -> Float[Array, " B"]:
    """log p(image | x_t) of `level_logits`."""
    log_probs = jax.nn.log_softmax(level_logits(x_t, gamma, levels))
    log_probs = jnp.take_along_axis(log_probs, image[..., None].astype(jnp.int32), axis=-1)
    return jnp.sum(log_probs.reshape(len(image), -1), axis=-1)


class Posterior(NamedTuple):
    """q(x_s | x_t, x), s less noisy than t."""

    mean: Float[Array, "*#B"]
    log_variance: Float[Array, "*#B"]
    """betatilde, the least that an optimal step has."""
    log_forward_variance: Float[Array, "*#B"]
    """beta, of q(x_t | x_s): the most that it has."""


def posterior(
    x: Float[Array, "*#B"], x_t: Float[Array, "*#B"], gamma_s: Float[Array, "*#B"], gamma_t: Float[Array, "*#B"]
) -> Posterior:
    """DDPM's (2006.11239, equations 6 and 7) between two levels of `variance_preserving`."""
    (alpha_s, sigma_s), (_, sigma_t) = variance_preserving(gamma_s), variance_preserving(gamma_t)
    change = -jnp.expm1(gamma_s - gamma_t)
    # (alpha_t / alpha_s) (sigma_s / sigma_t) = exp((gamma_s - gamma_t) / 2)
    mean = jnp.exp(0.5 * (gamma_s - gamma_t)) * (sigma_s / sigma_t) * x_t + alpha_s * change * x
    log_change = jnp.log(change)
    return Posterior(mean, jax.nn.log_sigmoid(gamma_s) + log_change, jax.nn.log_sigmoid(gamma_t) + log_change)


def divergence_of_gaussians(
    mean: Float[Array, "*#B"],
    log_variance: Float[Array, "*#B"],
    other_mean: Float[Array, "*#B"],
    other_log_variance: Float[Array, "*#B"],
) -> Float[Array, "*B"]:
    """KL(N(mean, .) || N(other_mean, .)), elementwise."""
    return gaussian_kl((mean - other_mean) * jnp.exp(-0.5 * other_log_variance), log_variance - other_log_variance)


def discretised_gaussian_log_prob(
    mean: Float[Array, "*#B"], log_variance: Float[Array, "*#B"], image: Int[Array, "*#B"], levels: int
) -> Float[Array, "*B"]:
    """log of the mass of a level's bin of width 2 / (levels - 1) on [-1, 1]; the outermost bins absorb the tails.

    (2006.11239, equation 13)
    """
    distance = to_unit_range(image, levels) - mean
    half_bin, inverse = 1 / (levels - 1), jnp.exp(-0.5 * log_variance)
    upper, lower = (distance + half_bin) * inverse, (distance - half_bin) * inverse
    # Above the mean both are mirrored, so that the difference is of small numbers and does not cancel.
    above = distance > 0
    high, low = jnp.where(above, -lower, upper), jnp.where(above, -upper, lower)
    log_high, log_low = jax.scipy.special.log_ndtr(high), jax.scipy.special.log_ndtr(low)
    inside = log_high + jnp.log(-jnp.expm1(jnp.minimum(log_low - log_high, -1e-7)))
    log_mass = jnp.where(image == 0, jax.scipy.special.log_ndtr(upper), inside)
    return jnp.where(image == levels - 1, jax.scipy.special.log_ndtr(-lower), log_mass)
