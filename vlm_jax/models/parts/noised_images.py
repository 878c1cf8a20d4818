"""Images that a sequence model draws by diffusion: what of them is noised, how, and what that says of their likelihood.

A first stage's latents, in the steps of a chain, as Transfusion has it (2408.11039); or the pixels themselves, on a
straight path to noise, of which the image is predicted, as JiT has it (2511.13720).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vlm_jax import models
from vlm_jax.contract import Input, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.models.parts import real_latents
from vlm_jax.models.parts.own_codes import OwnCodes
from vlm_jax.nn.image_patches import Patches
from vlm_jax.nn.images import Images
from vlm_jax.nn.vision import check_patches
from vlm_jax.objectives.chain import Chain
from vlm_jax.objectives.diffusion import cosine_betas, discrete_gammas
from vlm_jax.objectives.likelihood import from_unit_range, to_unit_range
from vlm_jax.objectives.straight import CLAMP, StraightPath
from vlm_jax.sampling.diffusion import Solving
from vlm_jax.trees import part

READ_NOISE = 0.1
"""The most noise of an image that is read (2604.24763)."""
FIRST = "image/first"
"""Where the variables of the first stage are, as it is in the family's `Config`: a `Start(workdir, into="image/first")`
fills and `frozen` keeps them."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """A first stage's latents, noised in the steps of a cosine's betas (2102.09672)."""

    first: Any
    """The `Config` of a family that has `encode`, `decode` and real `latents`, such as `autoencoder`."""
    patches: Patches
    predict: Literal["eps", "v"] = "eps"
    """What the loss is the squared error of: of the noise, as the paper's, or of v (2202.00512), by which little is
    wrong of the latents where an error in the noise would be of many deviations."""
    timesteps: int = 1000
    described_timesteps: int = 500
    """The most noise of an image that a text about it follows, in training (2408.11039, section 4.1)."""
    clip: float = 8.0
    """The largest latent, in deviations. At the end of a cosine's chain the latents are 1/20,000 of what is seen: an
    error of 1% in the noise would be taken for latents of 200 deviations, from which nothing comes back."""

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise UserError(f"clip is {self.clip}: it must be above 0")
        if not 1 < self.described_timesteps <= self.timesteps:
            raise UserError(
                f"described_timesteps is {self.described_timesteps}: it must be above 1 and at most timesteps, which "
                f"is {self.timesteps}"
            )


@dataclass(frozen=True, kw_only=True)
class Pixels(Images):
    """Pixels on a straight path to noise; the image is predicted, and the loss is of the velocity that follows.

    An image that a text about it follows, and one that is no target, is read and not drawn: it has no noise, or in
    training sometimes a little (Tuna-2, 2604.24763).
    """

    patches: Patches
    predict: Literal["velocity", "x", "eps"] = "x"
    logit_normal: tuple[float, float] | None = (0.8, 0.8)
    """Mean and deviation of logit(t), t the share of noise, in training; None: t is uniform."""
    shift: float = 1.0
    """Moves each t to shift t / (1 + (shift - 1) t), as in `probability_flow`."""
    even_share: float = 0.15
    """Of the times in training: uniform in log SNR instead, over all of which the likelihood's bound is. There the
    error is of the data: that of the velocity is up to 400 times as large with little noise, and at a share of 0.15 was
    most of the loss of images, beside which texts were hardly learned."""
    read_noise_share: float = 0.1
    """Of the images that are read, in training: their t is uniform up to 0.1."""
    masked_from: int | None = None
    """The step of the training from which, of half of the images that are drawn, up to half of the patches are masked
    (2604.24763); None: never."""

    def __post_init__(self) -> None:
        for name in ("even_share", "read_noise_share"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise UserError(f"{name} is {share}: a share lies in [0, 1]")
        if not self.shift > 0:
            raise UserError(f"shift is {self.shift}: it must be above 0, and 1 is for none")
        if self.logit_normal is not None and not self.logit_normal[1] > 0:
            raise UserError(f"logit_normal is {self.logit_normal}: its deviation must be above 0")


@dataclass(frozen=True, kw_only=True)
class CodedPixels(Pixels):
    """Pixels, before which codes of the image are named that the model has made itself."""

    codes: OwnCodes


class Noised(NamedTuple):
    """Functions of one kind of image. R is any number of images."""

    image: Input
    """The field of one."""
    shape: tuple[int, int, int]
    """Of what is noised."""
    path: Chain | StraightPath
    first: Model | None
    stage: Callable[..., Float[Array, "R h w M"]]
    """`(variables, image) -> kept`: what may be made of an image once for all epochs."""
    drawn: Callable[..., Float[Array, "R h w c"]]
    """`(kept, key=None) -> x`: what is noised; of latents, which are drawn, the mean without a key."""
    show: Callable[..., Int[Array, "R H W C"]]
    """`(variables, x) -> image`"""
    times: Callable[..., tuple[Num[Array, " R"], Bool[Array, " R"], Float[Array, " R"]]]
    """`(key, target, described, *, train) -> (t, learned, weight)`: the noise of images that are targets and that texts
    follow or are not, which of them the loss is of, and by what their squared errors count."""
    log_likelihood: Callable[..., Float[Array, " R"]] | None
    """`(variables, image, output, key) -> nats`, at most in expectation; `output(x_t, t)` is the network's."""


def noised(config: Latents | Pixels) -> Noised:
    """Refuses patches that do not tile, and a first stage of which there is nothing to noise."""
    found = of_latents(config) if isinstance(config, Latents) else of_pixels(config)
    check_patches(found.shape[0], config.patches.patch_size)
    return found


def own(variables: Variables) -> Variables:
    """The first stage's."""
    return part(variables, FIRST)


def of_latents(config: Latents) -> Noised:
    first = models.build(config.first)
    (side, _, channels), decode = real_latents.check_first(first).shape, first.decode
    assert decode is not None
    path = Chain(discrete_gammas(cosine_betas(config.timesteps)), config.predict, clip=config.clip)

    def drawn(kept: Float[Array, "R h w M"], key: Array | None = None) -> Float[Array, "R h w c"]:
        return jax.lax.stop_gradient(real_latents.drawn(first, kept, key)[0])

    def times(
        key: Array, target: Bool[Array, " R"], described: Bool[Array, " R"], *, train: bool
    ) -> tuple[Int[Array, " R"], Bool[Array, " R"], Float[Array, " R"]]:
        del train
        t = path.drawn_times(key, len(target))
        limited = -(-t * config.described_timesteps // config.timesteps)
        return jnp.where(target, jnp.where(described, limited, t), 0), target, jnp.ones(len(target))

    def log_likelihood(
        variables: Variables, image: Int[Array, "R H W C"], output: Callable[[Array, Array], Array], key: Array
    ) -> Float[Array, " R"]:
        latent_key, chain_key = jax.random.split(key)

        def log_prior(z: Float[Array, "R h w c"]) -> Float[Array, " R"]:
            return -path.bound(lambda x_t, t: path.prediction(output(x_t, t), x_t, t), z, z, chain_key)

        return real_latents.bound(first, own(variables), image, log_prior, latent_key)

    return Noised(
        image=first.inputs["image"],
        shape=(side, side, channels),
        path=path,
        first=first,
        stage=lambda variables, image: real_latents.moments(first, own(variables), image),
        drawn=drawn,
        show=lambda variables, x: decode(own(variables), x),
        times=times,
        log_likelihood=log_likelihood if real_latents.bounded(first) else None,
    )


def of_pixels(config: Pixels) -> Noised:
    path = StraightPath(config.predict, config.logit_normal, config.shift)

    def times(
        key: Array, target: Bool[Array, " R"], described: Bool[Array, " R"], *, train: bool
    ) -> tuple[Float[Array, " R"], Bool[Array, " R"], Float[Array, " R"]]:
        time_key, choice_key, even_key, noise_key = jax.random.split(key, 4)
        some, other = jax.random.split(choice_key)
        even = jax.random.bernoulli(some, config.even_share, target.shape)
        t = jnp.where(even, path.even_times(even_key, len(target)), path.drawn_times(time_key, len(target)))
        noisy = jax.random.bernoulli(other, config.read_noise_share if train else 0.0, target.shape)
        little = jnp.where(noisy, READ_NOISE * jax.random.uniform(noise_key, target.shape), 0)
        learned = target & ~described
        return jnp.where(learned, t, little), learned, jnp.where(even, jnp.maximum(t, CLAMP) ** 2, 1)

    def log_likelihood(
        variables: Variables, image: Int[Array, "R H W C"], output: Callable[[Array, Array], Array], key: Array
    ) -> Float[Array, " R"]:
        x = to_unit_range(image, config.levels)
        return -path.bound(lambda x_t, t: path.data(output(x_t, t), x_t, t), x, image, config.levels, key)

    return Noised(
        image=config.image,
        shape=config.shape,
        path=path,
        first=None,
        stage=lambda variables, image: to_unit_range(image, config.levels),
        drawn=lambda kept, key=None: kept,
        show=lambda variables, x: from_unit_range(x, config.levels),
        times=times,
        log_likelihood=log_likelihood,
    )


def masked_patches(key: Array, some: Bool[Array, "B N"], length: int) -> Bool[Array, "B N L"]:
    """Of half of the images, a share that is uniform up to a half (2604.24763).

    Args:
      some: which images may have masked patches at all.
    """
    half_key, share_key, place_key = jax.random.split(key, 3)
    half = jax.random.bernoulli(half_key, 0.5, some.shape) & some
    share = 0.5 * jax.random.uniform(share_key, some.shape)
    return half[..., None] & (jax.random.uniform(place_key, (*some.shape, length)) < share[..., None])


def check_solving(config: Latents | Pixels, sampling: Solving) -> None:
    """Refuses steps and solvers that a chain does not have."""
    if isinstance(config, Pixels):
        return
    if sampling.steps > config.timesteps:
        raise UserError(
            f"sampling.steps is {sampling.steps} and the model's chain has timesteps={config.timesteps}: ask for as "
            f"many at most"
        )
    if sampling.solver in ("euler", "heun"):
        raise UserError(
            f"sampling.solver is {sampling.solver}, which moves along a slope that a chain of steps does not have: "
            f"choose ancestral, ddim or dpm_solver"
        )
