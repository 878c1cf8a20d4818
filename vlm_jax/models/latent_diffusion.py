"""Latent diffusion (Rombach et al. 2021, 2112.10752): a diffusion model of what an autoencoder makes of images.

The first stage, of any family that encodes images as a map of real numbers and decodes it, stays as another run left it
(`Start(workdir, into="first")`, frozen ^first/); the prior, any of the families of diffusion, trains on its latents.
They bound the likelihood of images, E_q[log p(x | z) - log q(z | x) + log p(z)], the last by the prior's own bound.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax import models
from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.models.parts.real_latents import bound, bounded, check_first, drawn, moments
from vlm_jax.objectives.likelihood import subpixels
from vlm_jax.sampling.diffusion import OnStep
from vlm_jax.sharding import under
from vlm_jax.trees import assembled, part


@dataclass(frozen=True, kw_only=True)
class Config:
    """Two models, the second of the latents of the first."""

    first: Any
    """The `Config` of a family that has `encode`, `decode` and real `latents`, such as `autoencoder`."""
    prior: Any
    """That of `diffusion`, `vdm` or `probability_flow`, of real vectors (`levels` None) of the shape of the latents."""


def check_stages(first: Model, prior: Model) -> None:
    """Refuses two models of which the second is none of the first's latents."""
    made, modelled = check_first(first), prior.inputs["image"]
    if (made.shape, made.dtype) != (modelled.shape, modelled.dtype):
        raise UserError(
            f"the first stage makes latents {made.dtype}{list(made.shape)} and the prior models "
            f"{modelled.dtype}{list(modelled.shape)}: set prior.image_size, prior.channels and prior.levels by them"
        )


def build(config: Config) -> Model:
    """Samples of the prior, decoded, and a bound on the likelihood where the first stage has one of the pixels."""
    first, prior = models.build(config.first), models.build(config.prior)
    check_stages(first, prior)
    # Of the Model of each, what is known to be there.
    encode, decode, sample_prior, spec = first.encode, first.decode, prior.sample, prior.inputs["image"]
    assert encode is not None and decode is not None and sample_prior is not None
    told = {name: each for name, each in prior.inputs.items() if name != "image"}

    def init(key: Array, batch: Batch) -> Variables:
        first_key, prior_key = jax.random.split(key)
        latents = jnp.zeros((len(batch["image"]), *spec.shape))
        drawn = prior.init(prior_key, {**batch, "image": latents})
        return assembled({"first": first.init(first_key, {"image": batch["image"]}), "prior": drawn})

    def stage(variables: Variables, image: Int[Array, "B H W C"]) -> Float[Array, "B h w M"]:
        return moments(first, part(variables, "first"), image)

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """That of the prior, of latents drawn anew each time."""
        latent_key, prior_key = jax.random.split(key)
        kept = batch["stage"] if "stage" in batch else stage(variables, batch["image"])
        z, _ = drawn(first, jax.lax.stop_gradient(kept), latent_key)
        value, aux = prior.loss(part(variables, "prior"), {**batch, "image": z}, prior_key, step, train=train)
        rest = {collection: tree for collection, tree in variables.items() if collection != "params"}
        state = {c: {**tree, "prior": aux.state[c]} if c in aux.state else tree for c, tree in rest.items()}
        return value, aux._replace(state=state)

    def log_likelihood(variables: Variables, batch: Batch, key: Array) -> Float[Array, " B"]:
        """At one draw of the latents; a lower bound in expectation where that of the prior is one."""
        latent_key, prior_key = jax.random.split(key)

        def log_prior(z: Float[Array, "B h w Z"]) -> Float[Array, " B"]:
            assert prior.log_likelihood is not None
            return prior.log_likelihood(part(variables, "prior"), {**batch, "image": z}, prior_key)

        return bound(first, part(variables, "first"), batch["image"], log_prior, latent_key)

    def sample(
        variables: Variables,
        key: Array,
        given: Batch,
        *,
        num: int,
        temperature: float = 1.0,
        sampling: Any,
        on_step: OnStep | None = None,
    ) -> Int[Array, "num H W C"]:
        """The temperature is the prior's; pixels are the decoder's means. `on_step` sees states of latents."""
        told_so: dict[str, Any] = {"temperature": temperature, "sampling": sampling}
        if on_step is not None:
            told_so["on_step"] = on_step
        latents = sample_prior(part(variables, "prior"), key, given, num=num, **told_so)
        return decode(part(variables, "first"), latents)

    density: dict[str, Any] = {
        "log_likelihood": log_likelihood,
        "count": subpixels,
        "bound": "estimate" if prior.bound == "estimate" else "lower",
    }
    return Model(
        inputs={"image": first.inputs["image"], **told},
        init=init,
        loss=loss,
        rules=(*under("first", first.rules), *under("prior", prior.rules)),
        latents=first.latents,
        encode=lambda variables, *rest: encode(part(variables, "first"), *rest),
        decode=lambda variables, latents: decode(part(variables, "first"), latents),
        stage=stage,
        conditions=prior.conditions,
        sampling=prior.sampling,
        sample=sample,
        **(density if bounded(first) else {}),
    )
