"""The variational diffusion model (Kingma et al. 2021, 2107.00630): continuous time, trained on its own bound.

The data are noised along gamma, -log SNR, whose ends are learned, and perhaps its way from one to the other. The bound
on the likelihood of the levels, or on the density of real vectors, has three terms: what the noisiest image still tells
(prior), what undoing the noise costs (diffusion), and what the least noisy image leaves open (reconstruction).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from vlm_jax import models
from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Image, Told
from vlm_jax.nn.denoiser import Denoiser, Guidance, Network, check_network, network_rules
from vlm_jax.nn.images import ImagesOrLatents
from vlm_jax.nn.schedule import MONOTONE_SCHEDULE_RULES, MonotoneSchedule
from vlm_jax.nn.told import Conditions
from vlm_jax.objectives.diffusion import (
    Level,
    continuous_divergence,
    from_data,
    level_log_prob,
    level_logits,
    prior_divergence,
    spread,
    stratified,
    to_data,
    variance_preserving,
)
from vlm_jax.objectives.likelihood import gaussian_log_density, nats_to_bits_per_dim, subpixels, to_unit_range
from vlm_jax.sampling.diffusion import SOLVERS, Denoised, OnStep, Solving
from vlm_jax.trees import merge


@dataclass(frozen=True, kw_only=True)
class Config(ImagesOrLatents):
    """A network, and the noise that it learns to undo."""

    network: Network
    predict: Literal["eps", "x", "v"] = "eps"
    gamma_min: float = -13.3
    """-log SNR of the least noise, and of the most, before training."""
    gamma_max: float = 5.0
    schedule: Literal["linear", "monotone"] = "linear"
    """-log SNR between its ends: a line, or a network that only rises and is trained to lessen the loss's variance."""
    fourier: tuple[int, ...] = (6, 7)
    """The network also sees sin and cos of 2 pi 2^n x for these n: fine detail, by which levels are told apart."""
    text: Any = None
    """The `Config` of a family that has `text_features`, by which images are told; None: they are told no text."""

    def __post_init__(self) -> None:
        check_network(self.network, self.image_size, reads=self.text is not None)
        if self.gamma_min >= self.gamma_max:
            raise UserError(
                f"gamma_min={self.gamma_min} must be below gamma_max={self.gamma_max}: noise grows with time"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling(Solving):
    """How images are drawn."""

    steps: int = 250


class Terms(NamedTuple):
    """Of the bound, nats; their means are unbiased."""

    log_prob: Float[Array, " B"]
    """log p(image | x_0)."""
    diffusion: Float[Array, " B"]
    prior: Float[Array, " B"]
    t: Float[Array, " B"]
    """Where the diffusion was estimated."""


class VDM(nn.Module):
    """The noise schedule and the prediction of the noise."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.first = self.param("first_gamma", nn.initializers.constant(c.gamma_min), ())
        self.last = self.param("last_gamma", nn.initializers.constant(c.gamma_max), ())
        if c.schedule == "monotone":
            self.schedule = MonotoneSchedule()
        self.denoiser = Denoiser(c.network, c.channels)

    def ends(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """gamma at t = 0 and at t = 1."""
        return self.first, self.last

    def progress(self, t: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """How far gamma is from its first value to its last, 0 to 1, and the derivative of that."""
        return self.schedule(t) if self.config.schedule == "monotone" else (t, jnp.ones_like(t))

    def __call__(
        self,
        x_t: Image,
        gamma: Float[Array, "*B"],
        told: Told = Told(),
        *,
        train: bool = False,
        guidance: Guidance = Guidance(),
    ) -> Image:
        """The prediction of x."""
        c = self.config
        if self.is_initializing():
            self.progress(gamma)
        gamma = jnp.broadcast_to(gamma, (len(x_t),))
        waves = [wave(2 * jnp.pi * 2**n * x_t) for n in c.fourier for wave in (jnp.sin, jnp.cos)]
        time = 1000 * (gamma - c.gamma_min) / (c.gamma_max - c.gamma_min)
        inputs = jnp.concatenate([x_t, *waves], axis=-1)
        output = self.denoiser(inputs, time, told, train=train, guidance=guidance)
        if c.predict == "eps":
            output = output + x_t  # at high noise nearly right before any training; so in the authors' release
        level = Level(*(spread(value, x_t) for value in variance_preserving(gamma)))
        return to_data(output, x_t, level, c.predict)


def build(config: Config) -> Model:
    """A bound on the likelihood, and samples by undoing the noise step by step."""
    module: Any = VDM(config)  # linen types what `apply` returns as a union
    shape, network = config.shape, config.network
    reader = None if config.text is None else models.build(config.text)
    conditions = Conditions(network.classes, network.condition_dropout, reader)

    def to_input(image: Num[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return image if config.levels is None else to_unit_range(image, config.levels)

    def init(key: Array, batch: Batch) -> Variables:
        image, reader = batch["image"], conditions.drawn(jax.random.fold_in(key, 1))
        told = conditions.everything(reader, batch)
        return merge(module.init(key, to_input(image), jnp.zeros(len(image)), told), reader)

    def terms(variables: Variables, batch: Batch, key: Array, told: Told, *, train: bool) -> Terms:
        time_key, noise_key, first_key, dropout_key = jax.random.split(key, 4)
        image, x = batch["image"], to_input(batch["image"])
        first, last = module.apply(variables, method="ends")
        t = stratified(time_key, len(x))
        # The bound does not depend on the way from end to end: what a gradient would say of it is noise.
        progress, slope = jax.lax.stop_gradient(module.apply(variables, t, method="progress"))
        gamma = first + (last - first) * progress
        level = Level(*(spread(value, x) for value in variance_preserving(gamma)))
        eps = jax.random.normal(noise_key, x.shape)
        x_t = level.alpha * x + level.sigma * eps
        data = module.apply(variables, x_t, gamma, told, train=train, rngs={"dropout": dropout_key})
        diffusion = continuous_divergence(eps, from_data(data, x_t, level, "eps"), slope * (last - first))
        alpha, sigma = variance_preserving(first)
        x_0 = alpha * x + sigma * jax.random.normal(first_key, x.shape)
        if config.levels is None:
            log_prob = jnp.sum(gaussian_log_density(x, x_0 / alpha, first), axis=(1, 2, 3))
        else:
            log_prob = level_log_prob(x_0, first, image, config.levels)
        return Terms(log_prob, diffusion, prior_divergence(x, last), t)

    def second_moment(variables: Variables, t: Float[Array, " B"], cost: Float[Array, " B"]) -> Float[Array, ""]:
        """The mean square of the diffusion term, of which the gradient is that of its variance by the schedule.

        Over gamma, which t reaches by progress(t), it is the integral of slope times a square that the schedule does
        not change: so gamma is held, and t, which reaches it, moves with the schedule (the implicit function theorem).
        The paper (appendix I.2) differentiates the square itself, through the network.
        """
        progress, slope = module.apply(variables, t, method="progress")
        held, pace = jax.lax.stop_gradient((progress, slope))
        _, slope = module.apply(variables, t - (progress - held) / pace, method="progress")
        return jnp.mean(jax.lax.stop_gradient(jnp.square(cost) / pace) * slope)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative bound in bits a dimension, estimated at one time an image.

        A learned way of the schedule has the gradient of the estimate's variance, which the value does not hold.
        """
        del step
        told_key, key = jax.random.split(key)
        told = conditions.in_training(variables, batch, told_key) if train else conditions.everything(variables, batch)
        log_prob, diffusion, prior, t = terms(variables, batch, key, told, train=train)
        nats = {"reconstruction": log_prob, "diffusion": -diffusion, "prior": -prior}
        metrics = {f"{name}_bits_per_dim": nats_to_bits_per_dim(jnp.mean(value), shape) for name, value in nats.items()}
        value = sum(metrics.values(), jnp.float32(0))
        if config.schedule == "monotone":
            moment = second_moment(variables, t, nats_to_bits_per_dim(-diffusion, shape))
            value = value + moment - jax.lax.stop_gradient(moment)
        return value, Aux(metrics, weight=jnp.float32(len(t)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        log_prob, diffusion, prior, _ = terms(
            variables, batch, key, conditions.everything(variables, batch), train=False
        )
        return log_prob - diffusion - prior

    def sample(
        variables: Variables,
        key: Array,
        given: Batch,
        *,
        num: int,
        temperature: float = 1.0,
        sampling: Sampling,
        on_step: OnStep | None = None,
    ) -> Num[Array, "num H W C"]:
        """The temperature scales all noise; at 0 pixels are the likeliest levels. `on_step` sees the states."""
        told_key, noise_key, solver_key, level_key = jax.random.split(key, 4)
        conditions.check_guidance(sampling.guidance)
        told = conditions.in_drawing(variables, given, told_key, num)
        first, last = module.apply(variables, method="ends")

        def gamma(t: Array) -> Array:
            return first + (last - first) * module.apply(variables, t, method="progress")[0]

        def schedule(t: Array) -> Level:
            return variance_preserving(gamma(t))

        def denoise(x: Array, t: Array) -> Denoised:
            guidance = Guidance(sampling.guidance_at(schedule(t)), sampling.guidance_rescale)
            return Denoised(module.apply(variables, x, gamma(t), told, guidance=guidance))

        times = jnp.linspace(1.0, 0.0, sampling.steps + 1)
        x = temperature * jax.random.normal(noise_key, (num, *shape))
        solve = SOLVERS[sampling.solver]
        x = solve(denoise, schedule, times, x, solver_key, temperature=temperature, on_step=on_step)
        if config.levels is None:
            return x / variance_preserving(first)[0]
        logits = level_logits(x, first, config.levels)
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.uint8)
        return jax.random.categorical(level_key, logits / temperature).astype(jnp.uint8)

    return Model(
        inputs={"image": config.image, **conditions.inputs},
        init=init,
        loss=loss,
        rules=(
            (r"(first|last)_gamma$", ()),
            *(MONOTONE_SCHEDULE_RULES if config.schedule == "monotone" else ()),
            *conditions.rules,
            *network_rules(network, reads=reader is not None),
        ),
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="lower",
        conditions=conditions.inputs,
        sampling=Sampling(),
        sample=sample,
    )
