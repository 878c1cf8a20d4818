"""Sampling from a diffusion model: solvers on one interface, and the likelihood of the deterministic ones.

`solver(denoise, schedule, times, x, key, temperature=1.0, on_step=None)` takes the state x at `times[0]` to the one at
`times[-1]`. A schedule is a function t -> (alpha, sigma) with x_t = alpha x + sigma eps; at the last time sigma may
be 0. With n + 1 times there are n steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


class Solver(Protocol):
    """One of `SOLVERS`."""

    def __call__(
        self,
        denoise: Denoise,
        schedule: Schedule,
        times: Float[Array, " N"],
        x: Float[Array, "B ..."],
        key: Array,
        *,
        temperature: float = 1.0,
        on_step: OnStep | None = None,
    ) -> Float[Array, "B ..."]: ...


def run(step: Callable[[Any, Array], Any], carry: tuple[Array, Any], count: int, on_step: OnStep | None) -> Array:
    """`carry = step(carry, i)` for i below `count`, where the carry is x and what else the solver remembers."""

    def body(carry: Any, i: Array) -> tuple[Any, None]:
        carry = step(carry, i)
        if on_step is not None:
            jax.debug.callback(on_step, i + 1, carry[0])
        return carry, None

    return jax.lax.scan(body, carry, jnp.arange(count))[0][0]


def transfer(x: Array, data: Array, level: tuple[Array, Array], next_level: tuple[Array, Array]) -> Array:
    """The state at the next level that has the same noise, of x at this one and the data behind it."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level, next_level
    ratio = sigma_s / sigma_t
    return ratio * x + (alpha_s - alpha_t * ratio) * data


def ancestral(
    denoise: Denoise,
    schedule: Schedule,
    times: Float[Array, " N"],
    x: Float[Array, "B ..."],
    key: Array,
    *,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Float[Array, "B ..."]:
    """Draws each state from the posterior q(x_s | x_t, x) at the prediction of x (DDPM, 2006.11239)."""

    def step(carry: Any, i: Array) -> Any:
        x, _ = carry
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(times[i]), schedule(times[i + 1])
        data, mix = denoise(x, times[i])
        ratio = (alpha_t / alpha_s) * (sigma_s / sigma_t)
        change = (1 - ratio) * (1 + ratio)
        mean = ratio * (sigma_s / sigma_t) * x + alpha_s * change * data
        deviation = jnp.where(sigma_s > 0, jnp.sqrt(change) * sigma_t**mix * sigma_s ** (1 - mix), 0)
        return mean + temperature * deviation * jax.random.normal(jax.random.fold_in(key, i), x.shape), ()

    return run(step, (x, ()), len(times) - 1, on_step)


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    times: Float[Array, " N"],
    x: Float[Array, "B ..."],
    key: Array,
    *,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Float[Array, "B ..."]:
    """Keeps the predicted noise and changes its level: deterministic, of first order (2010.02502, eta = 0)."""
    del key, temperature

    def step(carry: Any, i: Array) -> Any:
        x, _ = carry
        return transfer(x, denoise(x, times[i]).data, schedule(times[i]), schedule(times[i + 1])), ()

    return run(step, (x, ()), len(times) - 1, on_step)


def dpm_solver(
    denoise: Denoise,
    schedule: Schedule,
    times: Float[Array, " N"],
    x: Float[Array, "B ..."],
    key: Array,
    *,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Float[Array, "B ..."]:
    """DPM-Solver++(2M), of second order (2211.01095, algorithm 2).

    As DDIM, with the data extrapolated along log(alpha / sigma) from two predictions to the middle of the step; the
    first and the last step are DDIM's, for want of a previous prediction and, where sigma ends at 0, of a middle.
    """
    del key, temperature
    steps = len(times) - 1

    def half_log_snr(i: Array) -> Array:
        alpha, sigma = schedule(times[i])
        return jnp.log(alpha) - jnp.log(sigma)

    def step(carry: Any, i: Array) -> Any:
        x, previous = carry
        data = denoise(x, times[i]).data
        forward = half_log_snr(i + 1) - half_log_snr(i)
        backward = half_log_snr(i) - half_log_snr(jnp.maximum(i - 1, 0))
        extrapolation = jnp.where((i == 0) | (i == steps - 1), 0.0, forward / (2 * jnp.where(i == 0, 1.0, backward)))
        middle = data + extrapolation * (data - previous)
        return transfer(x, middle, schedule(times[i]), schedule(times[i + 1])), data

    return run(step, (x, jnp.zeros_like(x)), steps, on_step)


def euler(
    denoise: Denoise,
    schedule: Schedule,
    times: Float[Array, " N"],
    x: Float[Array, "B ..."],
    key: Array,
    *,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Float[Array, "B ..."]:
    """Euler's method on the probability-flow ODE in the schedule's own time: of first order."""
    del key, temperature
    velocity = probability_flow(denoise, schedule)

    def step(carry: Any, i: Array) -> Any:
        x, _ = carry
        return x + (times[i + 1] - times[i]) * velocity(x, times[i]), ()

    return run(step, (x, ()), len(times) - 1, on_step)


def heun(
    denoise: Denoise,
    schedule: Schedule,
    times: Float[Array, " N"],
    x: Float[Array, "B ..."],
    key: Array,
    *,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Float[Array, "B ..."]:
    """Heun's method: of second order, with two predictions a step (2206.00364, algorithm 1).

    The last step is Euler's: at its end, where sigma may be 0, there is no velocity.
    """
    del key, temperature
    velocity, steps = probability_flow(denoise, schedule), len(times) - 1

    def step(carry: Any, i: Array) -> Any:
        x, _ = carry
        return heun_step(velocity, x, times[i], times[i + 1]), ()

    def last(carry: Any, i: Array) -> Any:
        x, _ = carry
        return x + (times[steps] - times[steps - 1]) * velocity(x, times[steps - 1]), ()

    x = run(step, (x, ()), steps - 1, on_step)
    shifted = None if on_step is None else lambda done, x: on_step(done + steps - 1, x)
    return run(last, (x, ()), 1, shifted)


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
    times: Float[Array, " N"],
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


SOLVERS: dict[str, Solver] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm_solver": dpm_solver,
    "euler": euler,
    "heun": heun,
}
