"""The loss of an autoencoder whose copies a critic and a judge look at (2012.09841, 2112.10752).

It is one loss: what the critic learns has no gradient for the autoencoder, and what that learns none for the critic.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOST = 1e4
"""Of the weight of what a critic says beside the error of reconstruction."""
MOMENTUM = 0.99
"""Of the averages of what the critic says (2104.03310)."""

Images = Float[Array, "B H W C"]
Kernel = Float[Array, "h w D C"]


class Onlookers(NamedTuple):
    """Who looks at images in [-1, 1]."""

    distance: Callable[[Images, Images], Float[Array, " B"]]
    """Between two in a judge's eyes, whose parameters have no gradient."""
    critic: Callable[[Images], Float[Array, "B h w"]]
    """What it says of each patch, large for what looks real."""
    still: Callable[[Images], Float[Array, "B h w"]]
    """The same, whose parameters have no gradient."""


class Weights(NamedTuple):
    """Of the parts of the loss."""

    judged: float
    """The distance in the judge's eyes, beside the mean absolute error."""
    adversarial: Float[Array, ""] | float
    """What the critic says, times what makes its gradient as long as the error's at the last layer."""
    lecam: float
    scale: float
    """What the error is multiplied by before its gradient is compared with the critic's, such as the number of
    sub-pixels; the whole is divided by it again."""


class Goal(Protocol):
    """What settings say of these."""

    @property
    def judged(self) -> float: ...

    @property
    def adversarial(self) -> float:
        """Of what the critic says, from step `start` on."""

    @property
    def start(self) -> int: ...

    @property
    def lecam(self) -> float: ...


def loss_of_copies(
    x: Images,
    paint: Callable[[Kernel], Images],
    kernel: Kernel,
    onlookers: Onlookers,
    averages: Mapping[str, Float[Array, ""]],
    goal: Goal,
    step: Array | int,
    *,
    scale: float,
    train: bool,
) -> tuple[Float[Array, ""], dict[str, Array], Mapping[str, Array]]:
    """`adversarial_loss` at a step of training; of held-out images the error alone, without what a critic says.

    Args:
      scale: as in `Weights`.
    """
    if not train:
        return error_of_copies(x, paint(kernel), onlookers.distance, goal.judged), {}, averages
    entered = goal.adversarial * jnp.float32(step >= goal.start)
    return adversarial_loss(x, paint, kernel, onlookers, averages, Weights(goal.judged, entered, goal.lecam, scale))


def error_of_copies(
    x: Images, copy: Images, distance: Callable[[Images, Images], Float[Array, " B"]], judged: float
) -> Float[Array, ""]:
    """The mean absolute error, and the mean distance in the judge's eyes."""
    return jnp.mean(jnp.abs(x - copy)) + judged * jnp.mean(distance(x, copy))


def adversarial_loss(
    x: Images,
    paint: Callable[[Kernel], Images],
    kernel: Kernel,
    onlookers: Onlookers,
    averages: Mapping[str, Float[Array, ""]],
    weights: Weights,
) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Array]]:
    """The loss of both, its parts, and the averages after it.

    Args:
      paint: from the kernel of the last layer to the copies.
      averages: of what the critic says, `real` and `fake`.
    """
    copy, at_last = jax.vjp(paint, kernel)
    stopped = jax.lax.stop_gradient(copy)

    def error(copy: Images) -> Float[Array, ""]:
        return weights.scale * error_of_copies(x, copy, onlookers.distance, weights.judged)

    def criticism(copy: Images) -> Float[Array, ""]:
        return -jnp.mean(onlookers.still(copy))

    (value, of_error), (criticised, of_criticism) = (jax.value_and_grad(term)(stopped) for term in (error, criticism))
    weight = weights.adversarial * balance(at_last(of_error)[0], at_last(of_criticism)[0])
    # Their gradients are there: with them the copies move both, and nobody looks at them a second time.
    value = value + weight * criticised + jnp.sum((of_error + weight * of_criticism) * (copy - stopped))
    real, fake = onlookers.critic(x), onlookers.critic(stopped)
    of_critic = hinge(real, fake) + weights.lecam * lecam(real, fake, averages["real"], averages["fake"])
    said = {"real": jnp.mean(real), "fake": jnp.mean(fake)}
    metrics = {
        "absolute_error": jnp.mean(jnp.abs(x - copy)),
        "critic_loss": of_critic,
        "critic_of_images": said["real"],
        "critic_of_copies": said["fake"],
        "critic_weight": weight,
    }
    after = {
        name: MOMENTUM * averages[name] + (1 - MOMENTUM) * jax.lax.stop_gradient(value) for name, value in said.items()
    }
    return value / weights.scale + of_critic, metrics, after


def hinge(real: Float[Array, "*B"], fake: Float[Array, "*B"]) -> Float[Array, ""]:
    """The critic's: half of how far it is from saying 1 of images and -1 of copies (1705.02894; 2012.09841)."""
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def lecam(
    real: Float[Array, "*B"], fake: Float[Array, "*B"], real_mean: Float[Array, ""], fake_mean: Float[Array, ""]
) -> Float[Array, ""]:
    """How far what it says of images is from what it said of copies, and the other way round (2104.03310, equation 3).

    It keeps a critic that sees few images from growing too sure.

    Args:
      real_mean: the moving average of what it says of images.
      fake_mean: of copies.
    """
    return jnp.mean(jnp.square(real - fake_mean)) + jnp.mean(jnp.square(fake - real_mean))


def balance(reconstruction: Float[Array, "..."], criticism: Float[Array, "..."]) -> Float[Array, ""]:
    """The weight that makes both gradients for the last layer equally long (2012.09841, equation 7).

    Args:
      reconstruction: the gradient of the error of reconstruction for the last layer's kernel.
      criticism: that of what the critic says.
    """
    length = jnp.linalg.norm(reconstruction) / (jnp.linalg.norm(criticism) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(length, 0, MOST))
