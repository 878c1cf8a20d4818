"""Models of a probability flow: rectified flow (Liu et al. 2022, 2209.03003) and EDM (Karras et al. 2022, 2206.00364).

An ordinary differential equation carries noise to data. The network learns its velocity by regression, samples solve
the equation one way, and the likelihood of an image is estimated by solving it the other way. A network that predicts
the data instead, of the same loss, is JiT's (2511.13720): what it has to know of noise does not grow with the patches,
as it does where the velocity or the noise is predicted.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from vlm_jax import models
from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.conditioning import Told
from vlm_jax.nn.denoiser import Denoiser, Guidance, Network, check_network, network_rules
from vlm_jax.nn.images import ImagesOrLatents
from vlm_jax.nn.told import Conditions
from vlm_jax.objectives.dequantisation import from_symmetric, to_symmetric
from vlm_jax.objectives.diffusion import (
    edm_preconditioning,
    rectified_flow,
    spread,
    stratified,
    variance_exploding,
)
from vlm_jax.objectives.likelihood import subpixels
from vlm_jax.objectives.straight import StraightPath
from vlm_jax.sampling.diffusion import SOLVERS, Denoised, OnStep, SolverName, Solving, ode_log_density, probability_flow
from vlm_jax.trees import merge

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""EDM's range of noise (2206.00364, table 1)."""


@dataclass(frozen=True, kw_only=True)
class Config(ImagesOrLatents):
    """A network and the path between noise and data."""

    network: Network
    process: Literal["rectified_flow", "edm"] = "rectified_flow"
    """Straight lines from data to noise, learned as a velocity; or noise of growing deviation, with a preconditioned
    prediction of the data."""
    predict: Literal["velocity", "x", "eps"] = "velocity"
    """What the network of a rectified flow gives: the velocity, or the data or the noise, from which the velocity
    follows (2511.13720, table 1)."""
    logit_normal: tuple[float, float] | None = None
    """Mean and deviation of logit(t), t the share of noise, in training (2403.03206, section 3.1); None: t is uniform.
    Of a rectified flow: EDM has its own."""
    shift: float = 1.0
    """Moves each t of a rectified flow to shift t / (1 + (shift - 1) t), in training and in drawing: above 1 to more
    noise, for larger images (2403.03206, equation 23). On unit noise it is a noise of that deviation."""
    text: Any = None
    """The `Config` of a family that has `text_features`, by which images are told; None: they are told no text."""
    data_deviation: float = 0.5
    """Of the data on [-1, 1], by which EDM is preconditioned."""
    likelihood_steps: int = 50
    """Of Heun's method from the data to the noise."""

    def __post_init__(self) -> None:
        check_network(self.network, self.image_size, reads=self.text is not None)
        if not self.shift > 0:
            raise UserError(f"shift is {self.shift}: it must be above 0, and 1 is for none")
        if self.logit_normal is not None and not self.logit_normal[1] > 0:
            raise UserError(f"logit_normal is {self.logit_normal}: its deviation must be above 0")
        if self.process == "edm" and (self.predict, self.logit_normal, self.shift) != ("velocity", None, 1.0):
            raise UserError("predict, logit_normal and shift are of a rectified flow: leave them out with process=edm")
        if self.likelihood_steps < 2:
            raise UserError(f"likelihood_steps is {self.likelihood_steps}: it must be at least 2")


@dataclass(frozen=True, kw_only=True)
class Sampling(Solving):
    """How images are drawn."""

    solver: SolverName = "heun"
    steps: int = 50


def karras_times(steps: int) -> Float[Array, " N"]:
    """Deviations of the noise from the most to the least, dense where it is small (2206.00364, equation 5)."""
    return jnp.linspace(SIGMA_MAX ** (1 / 7), SIGMA_MIN ** (1 / 7), steps) ** 7


def build(config: Config) -> Model:
    """Samples, and an estimate of the likelihood, of real vectors of their density."""
    module: Any = Denoiser(config.network, config.channels)
    shape, network = config.shape, config.network
    straight = config.process == "rectified_flow"
    schedule = rectified_flow if straight else variance_exploding
    path = StraightPath(config.predict, config.logit_normal, config.shift)
    reader = None if config.text is None else models.build(config.text)
    conditions = Conditions(network.classes, network.condition_dropout, reader)

    def dequantise(image: Num[Array, "B H W C"], key: Array) -> Float[Array, "B H W C"]:
        """Uniform within each level's share of [-1, 1]; real vectors stay as they are."""
        if config.levels is None:
            return image
        return to_symmetric(image, jax.random.uniform(key, image.shape), config.levels)[0]

    def init(key: Array, batch: Batch) -> Variables:
        image, reader = batch["image"], conditions.drawn(jax.random.fold_in(key, 1))
        told = conditions.everything(reader, batch)
        return merge(module.init(key, image.astype(jnp.float32), jnp.ones(len(image)), told), reader)

    def denoise(
        variables: Variables, x_t: Float[Array, "B H W C"], t: Array, told: Told, **options: Any
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
        """The prediction of x, and the output of the network. t is [B] or one for all."""
        t = jnp.broadcast_to(t, (len(x_t),))
        if straight:
            output = module.apply(variables, x_t, path.time(t), told, **options)
            return path.data(output, x_t, t), output
        p = edm_preconditioning(spread(t, x_t), config.data_deviation)
        output = module.apply(variables, p.into * x_t, 1000 * p.time.reshape(-1), told, **options)
        return p.skip * x_t + p.out * output, output

    def velocity(
        variables: Variables, x_t: Float[Array, "B H W C"], t: Float[Array, ""], told: Told
    ) -> Float[Array, "B H W C"]:
        return path.velocity(denoise(variables, x_t, t, told)[1], x_t, jnp.broadcast_to(t, (len(x_t),)))

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The mean squared error of the velocity, or EDM's of the data, so weighted that all noise counts alike."""
        del step
        told_key, data_key, time_key, noise_key, dropout_key = jax.random.split(key, 5)
        told = conditions.in_training(variables, batch, told_key) if train else conditions.everything(variables, batch)
        x = dequantise(batch["image"], data_key)
        if straight:
            t = path.drawn_times(time_key, len(x))
        else:  # ln sigma ~ N(-1.2, 1.2^2)
            even = jnp.clip(stratified(time_key, len(x)), 1e-6, 1 - 1e-6)
            t = jnp.exp(-1.2 + 1.2 * jax.scipy.special.ndtri(even))
        alpha, sigma = (spread(value, x) for value in schedule(t))
        eps = jax.random.normal(noise_key, x.shape)
        x_t = alpha * x + sigma * eps
        data, output = denoise(variables, x_t, t, told, train=train, rngs={"dropout": dropout_key})
        if straight:
            value = jnp.mean(path.squared_error(output, x, eps, t))
        else:
            value = jnp.mean(edm_preconditioning(sigma, config.data_deviation).weight * jnp.square(data - x))
        return value, Aux({}, weight=jnp.float32(len(x)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """The density of the dequantised image, by Heun's method and Hutchinson's estimator, times a level's share.

        Of real vectors it is the density alone.
        """
        data_key, probe_key = jax.random.split(key)
        x = dequantise(batch["image"], data_key)
        told = conditions.everything(variables, batch)
        probes = jax.random.rademacher(probe_key, (1, *x.shape), jnp.float32)
        if straight:
            times = jnp.linspace(0.0, 1.0, config.likelihood_steps + 1)
            # Not from the prediction of x, which does not tell the velocity at t = 0.
            density = ode_log_density(lambda x, t: velocity(variables, x, t, told), times, x, probes)
        else:
            flow = probability_flow(lambda x, t: Denoised(denoise(variables, x, t, told)[0]), schedule)
            times = karras_times(config.likelihood_steps + 1)[::-1]
            density = ode_log_density(flow, times, x, probes, SIGMA_MAX)
        return density if config.levels is None else density + math.prod(shape) * math.log(2 / config.levels)

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
        """The temperature scales all noise. `on_step` sees the states."""
        told_key, noise_key, solver_key = jax.random.split(key, 3)
        conditions.check_guidance(sampling.guidance)
        told = conditions.in_drawing(variables, given, told_key, num)

        def denoised(x: Array, t: Array) -> Denoised:
            guidance = Guidance(sampling.guidance_at(schedule(t)), sampling.guidance_rescale)
            return Denoised(denoise(variables, x, t, told, guidance=guidance)[0])

        times = path.solved_times(sampling.steps) if straight else jnp.append(karras_times(sampling.steps), 0.0)
        x = temperature * times[0] * jax.random.normal(noise_key, (num, *shape))
        solve = SOLVERS[sampling.solver]
        x = solve(denoised, schedule, times, x, solver_key, temperature=temperature, on_step=on_step)
        return x if config.levels is None else from_symmetric(x, config.levels)

    return Model(
        inputs={"image": config.image, **conditions.inputs},
        init=init,
        loss=loss,
        rules=(*conditions.rules, *network_rules(network, reads=reader is not None)),
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="estimate",
        dequantisation=None if config.levels is None else "uniform",
        conditions=conditions.inputs,
        sampling=Sampling(),
        sample=sample,
    )
