"""Denoising diffusion in discrete steps: DDPM (Ho et al. 2020, 2006.11239), improved (2102.09672), and DiT's.

A Markov chain adds noise to the data in `timesteps` steps and the model undoes one after the other. It is trained on
the squared error of its prediction; its bound on the likelihood is a sum over all steps.
"""

from dataclasses import dataclass
from functools import partial
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
from vlm_jax.objectives.chain import Chain, Prediction
from vlm_jax.objectives.diffusion import (
    Level,
    cosine_betas,
    discrete_gammas,
    linear_betas,
    min_snr_weight,
    prior_divergence,
    scaled_linear_betas,
    spread,
    variance_exploding,
    zero_terminal,
)
from vlm_jax.objectives.likelihood import (
    from_unit_range,
    nats_to_bits_per_dim,
    subpixels,
    to_unit_range,
)
from vlm_jax.sampling.diffusion import SOLVERS, Denoised, OnStep, Solving
from vlm_jax.trees import merge

BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "cosine": cosine_betas}


@dataclass(frozen=True, kw_only=True)
class Config(ImagesOrLatents):
    """A network, the chain that it undoes, and what it predicts."""

    network: Network
    timesteps: int = 1000
    betas: Literal["linear", "scaled_linear", "cosine"] = "linear"
    zero_terminal: bool = False
    """Change the betas so that the last state is noise alone (2305.08891)."""
    predict: Literal["eps", "x", "v"] = "eps"
    weighting: Literal["simple", "min_snr"] = "simple"
    """Of the squared errors of different times: alike, or min(SNR, 5) on those of x (2303.09556)."""
    variance: Literal["posterior", "forward", "learned"] = "posterior"
    """Of each step: the least that it can be, the most, or between the two as the network says (2102.09672)."""
    text: Any = None
    """The `Config` of a family that has `text_features`, by which images are told; None: they are told no text."""

    def __post_init__(self) -> None:
        check_network(self.network, self.image_size, reads=self.text is not None)
        if self.timesteps < 2:
            raise UserError(f"timesteps is {self.timesteps}: it must be at least 2")
        if self.zero_terminal and self.predict == "eps":
            raise UserError(
                "with zero_terminal the last state is noise alone, which says nothing of x where eps is predicted: set "
                "predict to v or x"
            )
        if self.betas == "linear" and self.timesteps <= 20:
            raise UserError(
                f"timesteps={self.timesteps} of linear betas would add more noise than there can be: choose more than "
                f"20, or betas=cosine"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling(Solving):
    """How images are drawn."""

    steps: int = 1000


def build(config: Config) -> Model:
    """Samples, and a bound on the likelihood, of real vectors on their density."""
    learned = config.variance == "learned"
    module: Any = Denoiser(config.network, config.channels * (2 if learned else 1))
    shape, network = config.shape, config.network
    betas = BETAS[config.betas](config.timesteps)
    gammas = discrete_gammas(zero_terminal(betas) if config.zero_terminal else betas)
    chain = Chain(gammas, config.predict, config.variance, config.levels, clip=None if config.levels is None else 1.0)
    reader = None if config.text is None else models.build(config.text)
    conditions = Conditions(network.classes, network.condition_dropout, reader)

    def to_input(image: Num[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return image if config.levels is None else to_unit_range(image, config.levels)

    def init(key: Array, batch: Batch) -> Variables:
        image, reader = batch["image"], conditions.drawn(jax.random.fold_in(key, 1))
        told = conditions.everything(reader, batch)
        return merge(module.init(key, to_input(image), jnp.zeros(len(image)), told), reader)

    def predict(variables: Variables, x_t: Float[Array, "B H W C"], t: Array, told: Told, **options: Any) -> Prediction:
        """t counts from 1."""
        guided = config.channels if learned else None
        output = module.apply(variables, x_t, chain.time(t), told, guided=guided, **options)
        return chain.prediction(output, x_t, t)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The mean squared error of the prediction; with a learned variance, also a thousandth of the bound."""
        del step
        told_key, time_key, noise_key, dropout_key = jax.random.split(key, 4)
        told = conditions.in_training(variables, batch, told_key) if train else conditions.everything(variables, batch)
        x = to_input(batch["image"])
        t = chain.drawn_times(time_key, len(x))
        eps = jax.random.normal(noise_key, x.shape)
        x_t = chain.noisy(x, t, eps)
        p = predict(variables, x_t, t, told, train=train, rngs={"dropout": dropout_key})
        level = Level(*(spread(each, x) for each in chain.level(t)))
        weight = min_snr_weight(level, config.predict) if config.weighting == "min_snr" else 1.0
        value = jnp.mean(weight * chain.squared_error(p.output, x, eps, t))
        # The bound trains the variance alone: through the mean it is too noisy (2102.09672, section 3.1).
        cost = chain.step_cost(x, x_t, t, p._replace(data=jax.lax.stop_gradient(p.data)), batch["image"])
        metrics = {"squared_error": value}
        if config.levels is not None:
            nats = {
                "reconstruction": config.timesteps * jnp.where(t == 1, cost, 0),
                "diffusion": config.timesteps * jnp.where(t > 1, cost, 0),
                "prior": prior_divergence(x, gammas[-1]),
            }
            metrics |= {f"{name}_bits_per_dim": nats_to_bits_per_dim(-jnp.mean(v), shape) for name, v in nats.items()}
        if learned:
            value = value + config.timesteps / 1000 * nats_to_bits_per_dim(-jnp.mean(cost), shape)
        return value, Aux(metrics, weight=jnp.float32(len(x)))

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """The bound, of whose sum over steps the last is computed and one other stands for all the others."""
        x, told = to_input(batch["image"]), conditions.everything(variables, batch)
        return -chain.bound(lambda x_t, t: predict(variables, x_t, t, told), x, batch["image"], key)

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
        """The temperature scales all noise. `on_step` sees the states, of `euler` and `heun` over alpha.

        Raises:
          UserError: `sampling` has more steps than the chain, or a solver that cannot begin at noise alone.
        """
        if sampling.steps > config.timesteps:
            raise UserError(
                f"sampling.steps is {sampling.steps} and the model's chain has timesteps={config.timesteps}: ask for "
                f"as many at most"
            )
        if config.zero_terminal and sampling.solver in ("euler", "heun"):
            raise UserError(
                f"sampling.solver is {sampling.solver}, which begins at sigma / alpha, and with zero_terminal that is "
                f"infinite: choose ancestral, ddim or dpm_solver"
            )
        told_key, noise_key, solver_key = jax.random.split(key, 3)
        conditions.check_guidance(sampling.guidance)
        told = conditions.in_drawing(variables, given, told_key, num)
        alphas, sigmas = chain.level(jnp.arange(config.timesteps + 1))
        ratios = sigmas / alphas

        def denoise(x: Array, t: Array) -> Denoised:
            guidance = Guidance(sampling.guidance_at(chain.level(t)), sampling.guidance_rescale)
            prediction = predict(variables, x, t, told, guidance=guidance)
            return Denoised(prediction.data, prediction.mix)

        def denoise_ratio(x: Array, ratio: Array) -> Denoised:
            t = jnp.argmin(jnp.abs(ratios - ratio))
            return denoise(alphas[t] * x, t)

        times = chain.solved_times(sampling.steps)
        x = temperature * jax.random.normal(noise_key, (num, *shape))
        solve = partial(SOLVERS[sampling.solver], key=solver_key, temperature=temperature, on_step=on_step)
        if sampling.solver in ("euler", "heun"):
            # The chain has no slope in t, which an ODE needs: x / alpha moves along sigma / alpha (2010.02502, eq. 14).
            x = solve(denoise_ratio, variance_exploding, ratios[times], x / alphas[-1])
        else:
            x = solve(denoise, chain.level, times, x)
        return x if config.levels is None else from_unit_range(x, config.levels)

    return Model(
        inputs={"image": config.image, **conditions.inputs},
        init=init,
        loss=loss,
        rules=(*conditions.rules, *network_rules(network, reads=reader is not None)),
        log_likelihood=log_likelihood,
        count=subpixels,
        bound="lower",
        conditions=conditions.inputs,
        sampling=Sampling(steps=config.timesteps),
        sample=sample,
    )
