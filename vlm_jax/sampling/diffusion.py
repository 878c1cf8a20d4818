"""Sampling from a diffusion model: solvers on one interface, and the likelihood of the deterministic ones.

`solver(denoise, schedule, times, x, key, temperature=1.0, on_step=None)` takes the state x at `times[0]` to the one at
`times[-1]`. A schedule is a function t -> (alpha, sigma) with x_t = alpha x + sigma eps; at the last time sigma may
be 0. With n + 1 times there are n steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from vlm_jax.errors import UserError

Schedule = Callable[[Array], tuple[Array, Array]]


class Denoised(NamedTuple):
    """What a model knows of x given x_t."""

    data: Float[Array, "B ..."]
    """Its mean."""
    mix: Float[Array, "B ..."] | float = 0.0
    """Where the logarithm of the variance of an ancestral step lies, between the posterior's (0) and that of the
    forward step (1)."""


Denoise = Callable[[Array, Array], Denoised]
"""`(x_t, t) -> Denoised`; the time is one scalar for the whole batch."""
OnStep = Callable[[Array, Array], None]
"""`(steps done, x)`, called on the host after each step: for a progress bar, or for frames of the process."""


class Moved(NamedTuple):
    """The distribution of the next state."""

    mean: Float[Array, "B ..."]
    data: Float[Array, "B ..."]
    """What the next step is told of this one: its prediction of x, where it made one."""
    deviation: Float[Array, "..."] | None = None
    """None: the next state is the mean."""


Step = Callable[[Array, Array, Array], Moved]
"""`(x, data of the step before, i) -> Moved`, from the state at `times[i]` to that at `times[i + 1]`."""


@dataclass(frozen=True)
class Solver:
    """The loop over the steps that a function describes."""

    steps: Callable[[Denoise, Schedule, Array], Step]
    """`(denoise, schedule, times) -> Step`"""

    def __call__(
        self,
        denoise: Denoise,
        schedule: Schedule,
        times: Num[Array, " N"],
        x: Float[Array, "B ..."],
        key: Array,
        *,
        temperature: float = 1.0,
        on_step: OnStep | None = None,
    ) -> Float[Array, "B ..."]:
        step = self.steps(denoise, schedule, times)

        def body(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            x, data, deviation = step(*carry, i)
            if deviation is not None:
                x = x + temperature * deviation * jax.random.normal(jax.random.fold_in(key, i), x.shape)
            if on_step is not None:
                jax.debug.callback(on_step, i + 1, x)
            return (x, data), None

        return jax.lax.scan(body, (x, jnp.zeros_like(x)), jnp.arange(len(times) - 1))[0][0]


def transfer(x: Array, data: Array, level: tuple[Array, Array], next_level: tuple[Array, Array]) -> Array:
    """The state at the next level that has the same noise, of x at this one and the data behind it."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level, next_level
    ratio = sigma_s / sigma_t
    return ratio * x + (alpha_s - alpha_t * ratio) * data


@Solver
def ancestral(denoise: Denoise, schedule: Schedule, times: Num[Array, " N"]) -> Step:
    """Draws each state from the posterior q(x_s | x_t, x) at the prediction of x (DDPM, 2006.11239)."""

    def step(x: Array, previous: Array, i: Array) -> Moved:
        del previous
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(times[i]), schedule(times[i + 1])
        data, mix = denoise(x, times[i])
        ratio = (alpha_t / alpha_s) * (sigma_s / sigma_t)
        change = (1 - ratio) * (1 + ratio)
        mean = ratio * (sigma_s / sigma_t) * x + alpha_s * change * data
        deviation = jnp.where(sigma_s > 0, jnp.sqrt(change) * sigma_t**mix * sigma_s ** (1 - mix), 0)
        return Moved(mean, data, deviation)

    return step


@Solver
def ddim(denoise: Denoise, schedule: Schedule, times: Num[Array, " N"]) -> Step:
    """Keeps the predicted noise and changes its level: deterministic, of first order (2010.02502, eta = 0)."""

    def step(x: Array, previous: Array, i: Array) -> Moved:
        del previous
        data = denoise(x, times[i]).data
        return Moved(transfer(x, data, schedule(times[i]), schedule(times[i + 1])), data)

    return step


@Solver
def dpm_solver(denoise: Denoise, schedule: Schedule, times: Num[Array, " N"]) -> Step:
    """DPM-Solver++(2M), of second order (2211.01095, algorithm 2).

    As DDIM, with the data extrapolated along log(alpha / sigma) from two predictions to the middle of the step; the
    first and the last step are DDIM's, for want of a previous prediction and, where sigma ends at 0, of a middle.
    """
    steps = len(times) - 1

    def half_log_snr(i: Array) -> Array:
        alpha, sigma = schedule(times[i])
        return jnp.log(alpha) - jnp.log(sigma)

    def step(x: Array, previous: Array, i: Array) -> Moved:
        data = denoise(x, times[i]).data
        forward = half_log_snr(i + 1) - half_log_snr(i)
        backward = half_log_snr(i) - half_log_snr(jnp.maximum(i - 1, 0))
        extrapolation = jnp.where((i == 0) | (i == steps - 1), 0.0, forward / (2 * jnp.where(i == 0, 1.0, backward)))
        middle = data + extrapolation * (data - previous)
        return Moved(transfer(x, middle, schedule(times[i]), schedule(times[i + 1])), data)

    return step


@Solver
def euler(denoise: Denoise, schedule: Schedule, times: Num[Array, " N"]) -> Step:
    """Euler's method on the probability-flow ODE in the schedule's own time: of first order."""
    velocity = probability_flow(denoise, schedule)

    def step(x: Array, previous: Array, i: Array) -> Moved:
        return Moved(x + (times[i + 1] - times[i]) * velocity(x, times[i]), previous)

    return step


@Solver
def heun(denoise: Denoise, schedule: Schedule, times: Num[Array, " N"]) -> Step:
    """Heun's method: of second order, with two predictions a step (2206.00364, algorithm 1).

    The last step is Euler's: at its end, where sigma may be 0, there is no velocity.
    """
    velocity, steps = probability_flow(denoise, schedule), len(times) - 1

    def step(x: Array, previous: Array, i: Array) -> Moved:
        t, s = times[i], times[i + 1]
        first = velocity(x, t)
        second = jax.lax.cond(i < steps - 1, lambda: velocity(x + (s - t) * first, s), lambda: first)
        return Moved(x + (s - t) * 0.5 * (first + second), previous)

    return step


def heun_step(velocity: Callable[[Any, Array], Any], x: Any, t: Array, s: Array) -> Any:
    """From t to s, for any tree of arrays."""
    first = velocity(x, t)
    second = velocity(jax.tree.map(lambda x, v: x + (s - t) * v, x, first), s)
    return jax.tree.map(lambda x, v, w: x + (s - t) * 0.5 * (v + w), x, first, second)


def probability_flow(denoise: Denoise, schedule: Schedule) -> Callable[[Array, Array], Array]:
    """dx/dt of the ODE whose states have the distribution of x_t at each time (2011.13456)."""

    def velocity(x: Array, t: Array) -> Array:
        (alpha, sigma), (alpha_slope, sigma_slope) = jax.jvp(schedule, (t,), (jnp.ones_like(t),))
        data = denoise(x, t).data
        return alpha_slope * data + sigma_slope * (x - alpha * data) / sigma

    return velocity


def ode_log_density(
    velocity: Callable[[Array, Array], Array],
    times: Num[Array, " N"],
    x: Float[Array, "B ..."],
    probes: Float[Array, "K B ..."],
    noise_deviation: Array | float = 1.0,
) -> Float[Array, " B"]:
    """log p(x) under dx/dt = velocity(x, t), whose state at `times[-1]` is Gaussian noise (FFJORD, 1810.01367).

    Heun's method from `times[0]`, where x lies. The divergence is Hutchinson's estimate, the mean of e^T J e over the
    probes e; it is unbiased if they have mean 0 and covariance 1, and the same probes serve the whole way.

    Returns:
      nats an image.
    """
    axes = tuple(range(1, x.ndim))

    def rates(state: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
        # e^T J, not J e: fused attention has no derivative in forward mode.
        value, pullback = jax.vjp(lambda x: velocity(x, t), state[0])
        traces = jax.vmap(lambda probe: jnp.sum(pullback(probe)[0] * probe, axis=axes))(probes)
        return value, jnp.mean(traces, axis=0)

    def step(state: tuple[Array, Array], i: Array) -> tuple[Any, None]:
        return heun_step(rates, state, times[i], times[i + 1]), None

    first = (x, jnp.zeros(len(x)))
    (x, divergence), _ = jax.lax.scan(step, first, jnp.arange(len(times) - 1))
    log_noise = jax.scipy.stats.norm.logpdf(x, scale=noise_deviation)
    return jnp.sum(log_noise, axis=axes) + divergence


SolverName = Literal["ancestral", "ddim", "dpm_solver", "euler", "heun"]
SOLVERS: dict[SolverName, Solver] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm_solver": dpm_solver,
    "euler": euler,
    "heun": heun,
}


@dataclass(frozen=True, kw_only=True)
class Solving:
    """How a family draws images by a solver; each states its own number of steps."""

    solver: SolverName = "ancestral"
    steps: int
    guidance: float = 1.0
    """Above 1: away from the prediction without a class and a text; at 0 that prediction itself (2207.12598)."""
    guidance_from: float = 0.0
    """There is guidance from this share of noise, sigma / (alpha + sigma), to `guidance_to` (2404.07724)."""
    guidance_to: float = 1.0
    guidance_rescale: float = 0.0
    """The share, 0 to 1, by which a guided prediction has the deviation of the one that is told (2305.08891)."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sampling.steps is {self.steps}: it must be at least 1")
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"sampling.guidance is {self.guidance}: it must be a number, at least 0, and 1 is for none")
        if not 0 <= self.guidance_from <= self.guidance_to <= 1:
            raise UserError(
                f"sampling.guidance_from and guidance_to are {self.guidance_from} and {self.guidance_to}: they must be "
                f"shares of noise, 0 to 1, the first not above the second"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"sampling.guidance_rescale is {self.guidance_rescale}: it must be a share, 0 to 1")

    def guidance_at(self, level: tuple[Array, Array]) -> float | Array:
        """What of the guidance there is at a level of noise."""
        if self.guidance == 1 or (self.guidance_from, self.guidance_to) == (0, 1):
            return self.guidance
        alpha, sigma = level
        share = sigma / (alpha + sigma)
        return jnp.where((share >= self.guidance_from) & (share <= self.guidance_to), self.guidance, 1.0)
