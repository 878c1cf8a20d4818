"""Models of a probability flow: rectified flow (Liu et al. 2022, 2209.03003) and EDM (Karras et al. 2022, 2206.00364).

An ordinary differential equation carries noise to data. The network learns its velocity by regression, samples solve
the equation one way, and the likelihood of an image is estimated by solving it the other way.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.denoiser import (
    Denoiser,
    Network,
    check_network,
    network_rules,
)
from vlm_jax.nn.images import ImagesOrLatents
from vlm_jax.nn.labels import label_input, sampling_labels, training_labels
from vlm_jax.objectives.dequantisation import from_symmetric, to_symmetric
from vlm_jax.objectives.diffusion import (
    edm_preconditioning,
    rectified_flow,
    spread,
    stratified,
    to_data,
    variance_exploding,
)
from vlm_jax.objectives.likelihood import subpixels
from vlm_jax.sampling.diffusion import SOLVERS, Denoised, OnStep, SolverName, Solving, ode_log_density, probability_flow

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""EDM's range of noise (2206.00364, table 1)."""


@dataclass(frozen=True, kw_only=True)
class Config(ImagesOrLatents):
    """A network and the path between noise and data."""

    network: Network
    process: Literal["rectified_flow", "edm"] = "rectified_flow"
    """Straight lines from data to noise, learned as a velocity; or noise of growing deviation, with a preconditioned
    prediction of the data."""
    data_deviation: float = 0.5
    """Of the data on [-1, 1], by which EDM is preconditioned."""
    likelihood_steps: int = 50
    """Of Heun's method from the data to the noise."""

    def __post_init__(self) -> None:
        check_network(self.network, self.image_size)
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
    """Samples, and an estimate of the likelihood where the data are levels."""
    module: Any = Denoiser(config.network, config.channels)
    shape, network = config.shape, config.network
    straight = config.process == "rectified_flow"
    schedule = rectified_flow if straight else variance_exploding

    def dequantise(image: Num[Array, "B H W C"], key: Array) -> Float[Array, "B H W C"]:
        """Uniform within each level's share of [-1, 1]; real vectors stay as they are."""
        if config.levels is None:
            return image
        return to_symmetric(image, jax.random.uniform(key, image.shape), config.levels)[0]

    def init(key: Array, batch: Batch) -> Variables:
        image = batch["image"]
        return module.init(key, image.astype(jnp.float32), jnp.ones(len(image)), batch.get("label"))

    def denoise(
        variables: Variables, x_t: Float[Array, "B H W C"], t: Array, label: Array | None, **options: Any
    ) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
        """The prediction of x, and the network's own output: the velocity, or EDM's F. t is [B] or one for all."""
        t = jnp.broadcast_to(t, (len(x_t),))
        if straight:
            velocity = module.apply(variables, x_t, 1000 * t, label, **options)
            return to_data(velocity, x_t, rectified_flow(spread(t, x_t)), "velocity"), velocity
        p = edm_preconditioning(spread(t, x_t), config.data_deviation)
        output = module.apply(variables, p.into * x_t, 1000 * p.time.reshape(-1), label, **options)
        return p.skip * x_t + p.out * output, output

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The mean squared error of the velocity, or EDM's of the data, so weighted that all noise counts alike."""
        del step
        label_key, data_key, time_key, noise_key, dropout_key = jax.random.split(key, 5)
        label = batch.get("label")
        if train:
            label = training_labels(label_key, label, network.classes, network.class_dropout)
        x = dequantise(batch["image"], data_key)
        t = stratified(time_key, len(x))
        if not straight:  # ln sigma ~ N(-1.2, 1.2^2)
            t = jnp.exp(-1.2 + 1.2 * jax.scipy.special.ndtri(jnp.clip(t, 1e-6, 1 - 1e-6)))
        alpha, sigma = (spread(value, x) for value in schedule(t))
        eps = jax.random.normal(noise_key, x.shape)
        x_t = alpha * x + sigma * eps
        data, velocity = denoise(variables, x_t, t, label, train=train, rngs={"dropout": dropout_key})
        if straight:
            value = jnp.mean(jnp.square(velocity - (eps - x)))
        else:
            value = jnp.mean(edm_preconditioning(sigma, config.data_deviation).weight * jnp.square(data - x))
        return value, Aux({}, weight=jnp.float32(len(x)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """The density of the dequantised image, by Heun's method and Hutchinson's estimator, times a level's share."""
        data_key, probe_key = jax.random.split(key)
        x = dequantise(batch["image"], data_key)
        label = batch.get("label")
        probes = jax.random.rademacher(probe_key, (1, *x.shape), jnp.float32)
        if straight:
            times = jnp.linspace(0.0, 1.0, config.likelihood_steps + 1)
            # Not from the prediction of x, which does not tell the velocity at t = 0.
            density = ode_log_density(lambda x, t: denoise(variables, x, t, label)[1], times, x, probes)
        else:
            flow = probability_flow(lambda x, t: Denoised(denoise(variables, x, t, label)[0]), schedule)
            times = karras_times(config.likelihood_steps + 1)[::-1]
            density = ode_log_density(flow, times, x, probes, SIGMA_MAX)
        return density + math.prod(shape) * math.log(2 / (config.levels or 1))

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
        label_key, noise_key, solver_key = jax.random.split(key, 3)
        label = sampling_labels(label_key, given.get("label"), network.classes, num)

        def denoised(x: Array, t: Array) -> Denoised:
            return Denoised(denoise(variables, x, t, label, guidance=sampling.guidance)[0])

        if straight:
            times = jnp.linspace(1.0, 0.0, sampling.steps + 1)
        else:
            times = jnp.append(karras_times(sampling.steps), 0.0)
        x = temperature * times[0] * jax.random.normal(noise_key, (num, *shape))
        solve = SOLVERS[sampling.solver]
        x = solve(denoised, schedule, times, x, solver_key, temperature=temperature, on_step=on_step)
        return x if config.levels is None else from_symmetric(x, config.levels)

    conditions = label_input(network.classes)
    return Model(
        inputs={"image": config.image, **conditions},
        init=init,
        loss=loss,
        rules=network_rules(config.network),
        log_likelihood=None if config.levels is None else log_likelihood,
        count=None if config.levels is None else subpixels,
        bound=None if config.levels is None else "estimate",
        dequantisation=None if config.levels is None else "uniform",
        conditions=conditions,
        sampling=Sampling(),
        sample=sample,
    )
