"""Every step of the samplers, the schedules and the conversions are those of the schedulers of `diffusers`."""

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from jaxtyping import Array, Float

from vlm_jax.objectives.diffusion import (
    Level,
    Parameterisation,
    cosine_betas,
    edm_preconditioning,
    from_data,
    linear_betas,
    rectified_flow,
    scaled_linear_betas,
    to_data,
    variance_exploding,
    zero_terminal,
)
from vlm_jax.sampling.diffusion import Denoised, Schedule, Solver, ancestral, ddim, dpm_solver, euler, heun

# Theirs, of the conversion of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 6))
STEPS = 10
TOLERANCE = 1e-6
KINDS: dict[Parameterisation, str] = {"eps": "epsilon", "x": "sample", "v": "v_prediction"}


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    """Steps are compared, not the rounding of states that grow to 150."""
    with jax.enable_x64(True):
        yield


def network(x: Any, t: Any) -> Any:
    """A prediction that depends on all of the state and on the time; of any library's arrays."""
    if torch.is_tensor(x):
        return torch.from_numpy(network(x.numpy(), float(t)))
    return 0.5 * (x + 0.3 * t / 1000) / (1 + x**2) ** 0.5 + 0.1 * x[::-1]


def states_of(solver: Solver, denoise: Any, schedule: Schedule, times: Any, x: Any) -> list[np.ndarray]:
    """The state after each step."""
    states: dict[int, np.ndarray] = {}

    def keep(done: Array, x: Array) -> None:
        states[int(done)] = np.asarray(x)

    solver(denoise, schedule, jnp.asarray(times), jnp.asarray(x), KEY, on_step=keep)
    jax.effects_barrier()
    return [states[i] for i in sorted(states)]


def their_states(scheduler: Any, x: np.ndarray, model: Callable[[Any, Any], Any] = network) -> list[np.ndarray]:
    """The state after each call of `step`, its coefficients in double precision."""
    for name in ("alphas", "betas", "alphas_cumprod", "sigmas", "alpha_t", "sigma_t", "lambda_t"):
        if torch.is_tensor(getattr(scheduler, name, None)):
            setattr(scheduler, name, getattr(scheduler, name).double())
    states, state = [], torch.from_numpy(x)
    scheduler.is_scale_input_called = True  # the network here sees the state as it is
    for t in scheduler.timesteps:
        state = scheduler.step(model(state, t), t, state).prev_sample
        states.append(state.numpy())
    return states


def assert_same(ours: list[Float[np.ndarray, "B D"]], theirs: list[Float[np.ndarray, "B D"]]) -> None:
    """Of the largest entry, for some of theirs computes in single precision whatever it is given."""
    assert len(ours) == len(theirs) and np.abs(ours[-1] - X).max() > 0.1
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * np.abs(other).max())


def chain(scheduler: Any) -> Schedule:
    """Its levels of noise; time t has been noised t times, so that 0 is the data."""
    signal = np.concatenate([[1.0], scheduler.alphas_cumprod.double().numpy()])
    alphas, sigmas = jnp.sqrt(jnp.asarray(signal)), jnp.sqrt(jnp.asarray(1 - signal))
    return lambda t: Level(alphas[t], sigmas[t])


def chain_times(scheduler: Any) -> np.ndarray:
    return np.append(scheduler.timesteps.numpy() + 1, 0)


def predict(kind: Parameterisation, schedule: Schedule, mix: float = 0.0) -> Callable[[Array, Array], Denoised]:
    """The prediction of x in what the network says."""
    return lambda x, t: Denoised(to_data(network(x, t - 1.0), x, Level(*schedule(t)), kind), mix)


@pytest.mark.parametrize(("ours", "theirs"), [(linear_betas, "linear"), (cosine_betas, "squaredcos_cap_v2")])
def test_betas(ours: Callable[[int], list[float]], theirs: str):
    np.testing.assert_allclose(ours(1000), diffusers.DDPMScheduler(beta_schedule=theirs).betas, atol=TOLERANCE)


@pytest.mark.parametrize("zero", [False, True], ids=["as trained", "ending in noise"])
def test_betas_of_stable_diffusion(zero: bool):
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = diffusers.DDIMScheduler(**settings, rescale_betas_zero_snr=zero).betas
    ours = scaled_linear_betas(1000)
    # Theirs are ratios of differences in float32, the last of them of a few thousandths.
    np.testing.assert_allclose(zero_terminal(ours) if zero else ours, theirs, atol=1e-5 if zero else TOLERANCE)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_noise_and_targets(kind: Parameterisation):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    t, eps = np.array([0, 30, 60, 99]), np.random.default_rng(1).normal(size=X.shape)
    tensors = torch.from_numpy(X), torch.from_numpy(eps), torch.from_numpy(t)
    level = Level(*(value[:, None] for value in chain(scheduler)(t + 1)))
    x_t = level.alpha * X + level.sigma * eps
    np.testing.assert_allclose(x_t, scheduler.add_noise(*tensors), atol=TOLERANCE)
    expected = eps if kind == "eps" else scheduler.get_velocity(*tensors)
    np.testing.assert_allclose(from_data(X, x_t, level, kind), expected, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [STEPS, 100], ids=["some", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("variance", "mix"), [("fixed_small", 0.0), ("fixed_large", 1.0), ("learned_range", 0.3)], ids=lambda v: str(v)
)
def test_ancestral_steps(
    monkeypatch: pytest.MonkeyPatch, variance: str, mix: float, kind: Parameterisation, steps: int
):
    """Of the same noise; `learned_range` means by -1 what is 0 here."""
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        variance_type=variance,
        prediction_type=KINDS[kind],
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    count = iter(range(steps))
    draws = {i: jax.random.normal(jax.random.fold_in(KEY, i), X.shape) for i in range(steps)}
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda *_, **__: torch.from_numpy(np.array(draws[next(count)]))
    )

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        output = network(x, t)
        return torch.cat([output, torch.full_like(output, 2 * mix - 1)], 1) if variance == "learned_range" else output

    schedule = chain(scheduler)
    ours = states_of(ancestral, predict(kind, schedule, mix), schedule, chain_times(scheduler), X)
    assert_same(ours, their_states(scheduler, X, model))


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_steps(kind: Parameterisation):
    scheduler = diffusers.DDIMScheduler(prediction_type=KINDS[kind], clip_sample=False)
    scheduler.set_timesteps(STEPS)
    schedule = chain(scheduler)
    ours = states_of(ddim, predict(kind, schedule), schedule, chain_times(scheduler), X)
    assert_same(ours, their_states(scheduler, X))


@pytest.mark.parametrize("kind", KINDS)
def test_dpm_solver_steps(kind: Parameterisation):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type=KINDS[kind], final_sigmas_type="zero"
    )
    scheduler.set_timesteps(2 * STEPS)
    schedule = chain(scheduler)
    ours = states_of(dpm_solver, predict(kind, schedule), schedule, chain_times(scheduler), X)
    assert_same(ours, their_states(scheduler, X))


@pytest.mark.parametrize("kind", ["eps", "x"])
@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [(euler, diffusers.EulerDiscreteScheduler), (heun, diffusers.HeunDiscreteScheduler)],
    ids=["euler", "heun"],
)
def test_steps_in_the_deviation_of_the_noise(solver: Solver, scheduler: Any, kind: Parameterisation):
    """From 150 to 0; of Heun's two predictions a step `diffusers` makes two steps, but for the last."""
    theirs = scheduler(prediction_type=KINDS[kind])
    theirs.set_timesteps(STEPS)
    sigmas = np.append(theirs.sigmas[:-1].unique().flip(0).double().numpy(), 0.0)
    start = X * sigmas[0]

    def denoise(x: Array, sigma: Array) -> Denoised:
        return Denoised(to_data(network(x, 1000.0), x, Level(*variance_exploding(sigma)), kind))

    expected = their_states(theirs, start, lambda x, _: network(x, 1000.0))
    if solver is heun:
        expected = expected[1:-1:2] + expected[-1:]
    assert_same(states_of(solver, denoise, variance_exploding, sigmas, start), expected)


@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [(euler, diffusers.FlowMatchEulerDiscreteScheduler), (heun, diffusers.FlowMatchHeunDiscreteScheduler)],
    ids=["euler", "heun"],
)
def test_steps_of_rectified_flow(solver: Solver, scheduler: Any):
    theirs = scheduler()
    theirs.set_timesteps(STEPS)
    times = np.append(theirs.sigmas[:-1].unique().flip(0).double().numpy(), 0.0)

    def denoise(x: Array, t: Array) -> Denoised:
        return Denoised(to_data(network(x, 1000.0), x, Level(*rectified_flow(t)), "velocity"))

    expected = their_states(theirs, X, lambda x, _: network(x, 1000.0))
    if solver is heun:
        expected = expected[1:-1:2] + expected[-1:]
    assert_same(states_of(solver, denoise, rectified_flow, times, X), expected)


def test_steps_and_preconditioning_of_edm():
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(STEPS)
    sigmas = theirs.sigmas.double().numpy()
    start = X * sigmas[0]

    def denoise(x: Array, sigma: Array) -> Denoised:
        p = edm_preconditioning(sigma)
        return Denoised(p.skip * x + p.out * network(p.into * x, 1000 * p.time))

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        i = int((theirs.timesteps == t).nonzero()[0, 0])
        return network(theirs.precondition_inputs(x, theirs.sigmas[i]), 1000 * t)

    assert_same(states_of(euler, denoise, variance_exploding, sigmas, start), their_states(theirs, start, model))
