"""A first stage of real latents as a part of other models: what is kept of an image, and what is drawn of that."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.objectives.likelihood import gaussian_log_density


def check_first(first: Model) -> Input:
    """What its latents are; refuses a model without such."""
    spec = first.latents
    if not isinstance(spec, Input) or spec.dtype != "float32" or first.encode is None or first.decode is None:
        raise UserError(
            "the first stage does not encode images as one array of real numbers and decode it: choose another for "
            "`first`, such as an autoencoder"
        )
    return spec


def moments(first: Model, variables: Variables, image: Int[Array, "B H W C"]) -> Float[Array, "B h w M"]:
    """Mean and log-variance of the latents, one after the other; of a first stage that draws none, its latents."""
    assert first.encode is not None
    if first.posterior is None:
        return first.encode(variables, image)
    return jnp.concatenate(first.posterior(variables, image), axis=-1)


def drawn(
    first: Model, kept: Float[Array, "B h w M"], key: Array | None
) -> tuple[Float[Array, "B h w Z"], Float[Array, " B"]]:
    """Latents of `moments`, and log q of them; without a key their means."""
    if first.posterior is None:
        return kept, jnp.zeros(len(kept))
    mean, log_variance = jnp.split(kept, 2, axis=-1)
    z = mean if key is None else mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    return z, jnp.sum(gaussian_log_density(z, mean, log_variance), axis=(1, 2, 3))


def bounded(first: Model) -> bool:
    """Whether images have a bound: latents have a density where they are drawn, and pixels where they are given."""
    return first.log_likelihood_given is not None and first.posterior is not None


def bound(
    first: Model,
    variables: Variables,
    image: Int[Array, "B H W C"],
    log_prior: Callable[[Float[Array, "B h w Z"]], Float[Array, " B"]],
    key: Array,
) -> Float[Array, " B"]:
    """E_q[log p(image | z) - log q(z | image) + log p(z)] in nats, at one draw."""
    assert first.log_likelihood_given is not None
    z, log_posterior = drawn(first, moments(first, variables, image), key)
    return first.log_likelihood_given(variables, image, z) - log_posterior + log_prior(z)
