"""TarFlow, a transformer autoregressive flow (Zhai et al. 2024, 2412.06329): an invertible map of an image to noise.

An image is a sequence of patches. A block scales and shifts each of them by functions of those before it, which a
causal transformer computes for all at once; only the inverse goes patch by patch. From one block to the next the order
turns round. With uniform dequantisation the density bounds the probability of the integers. Trained on images with
Gaussian noise instead it gives better samples, which a step along its own score then cleans, and no likelihood of
images. Guidance draws them further: each patch's shift and scale go away from those that know no class.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Aux, Batch, Model, Variables
from vlm_jax.errors import UserError
from vlm_jax.nn.attention import Cache, empty_cache
from vlm_jax.nn.images import Images
from vlm_jax.nn.labels import check_classes, label_input, sampling_labels, training_labels
from vlm_jax.nn.stack import unrolled
from vlm_jax.nn.transformer import TRANSFORMER_RULES, Transformer, TransformerStack
from vlm_jax.nn.vision import check_patches, patchify, unpatchify
from vlm_jax.objectives.dequantisation import from_symmetric, standard_normal_log_density, to_symmetric
from vlm_jax.objectives.likelihood import from_unit_range, nats_to_bits_per_dim, subpixels, to_unit_range
from vlm_jax.sharding import constrain
from vlm_jax.trees import map_with_path


@dataclass(frozen=True, kw_only=True)
class Config(Images):
    """A stack of autoregressive blocks over the patches of an image."""

    patch_size: int = 1
    blocks: int
    classes: int | None = None
    """Labels that images are drawn given; None: images have none."""
    class_dropout: float = 0.1
    """Share of training examples whose class is not told, for guidance."""
    noise: float | None = None
    """Deviation of Gaussian noise on images in [-1, 1], for samples rather than likelihoods; None: uniform
    dequantisation."""
    transformer: Transformer
    """Of each block."""

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch_size)
        if self.blocks < 1:
            raise UserError(f"blocks is {self.blocks}: it must be at least 1")
        check_classes(self.classes)
        if self.noise is not None and not self.noise > 0:
            raise UserError(f"noise is {self.noise}: it must be above 0, or None for uniform dequantisation")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are drawn: the settings of `reverse` in the authors' release."""

    guidance: float = 0.0
    """How far each patch's shift and scale go beyond what they are, away from those without a class; 0: no guidance."""
    rising: bool = True
    """Guidance rises from 0 at a block's first patch to its value at the last; False: it is the same everywhere."""
    attention_temperature: float = 1.0
    """Divides the logits of attention in what guidance goes away from: for a model without classes, another than 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"sampling.guidance is {self.guidance}: it must be a number, at least 0, which is none")
        if not 0 < self.attention_temperature < math.inf:
            raise UserError(
                f"sampling.attention_temperature is {self.attention_temperature}: it must be a number above 0"
            )


def patches(config: Config) -> tuple[int, int]:
    """How many an image has, and the sub-pixels of each."""
    return (config.image_size // config.patch_size) ** 2, config.patch_size**2 * config.channels


class Block(nn.Module):
    """z_t = (x_t - mu_t) exp(-alpha_t), both functions of x_0 ... x_{t-1}, in fp32 whatever computes them.

    The paper leaves the first patch of each block as it is; here it has a map too, that depends on the class alone.
    """

    config: Config

    def setup(self) -> None:
        c, t = self.config, self.config.transformer
        length, size = patches(c)
        init = nn.initializers.normal(0.01)
        self.embed = nn.Dense(t.width, dtype=t.dtype)
        self.position = self.param("position", init, (length, t.width))
        if c.classes is not None:
            self.label = self.param("label", init, (c.classes, t.width))
        self.transformer = TransformerStack(t)
        # In full precision: an accelerator's default product of fp32 would round what is exponentiated.
        self.affine = nn.Dense(2 * size, kernel_init=nn.initializers.zeros, precision="highest")

    def parameters(
        self,
        before: Float[Array, "B T N"],
        place: Float[Array, "T D"] | Float[Array, " D"],
        label: Int[Array, " B"] | None,
        *,
        train: bool = False,
        cache: tuple[Cache, ...] | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"], tuple[Cache, ...] | None]:
        """mu and alpha of the patches that follow those `before`; with a cache, of those from `position` on."""
        x = self.embed(before) + place
        if label is not None:  # that of no class has the mean of all, as in the authors' release
            x = x + jnp.concatenate([self.label, jnp.mean(self.label, axis=0, keepdims=True)])[label][:, None]
        x, cache = self.transformer(x, causal=True, cache=cache, slot=position, train=train)
        mu, alpha = jnp.split(self.affine(x.astype(jnp.float32)), 2, axis=-1)
        return mu, alpha, cache

    def __call__(
        self, x: Float[Array, "B T N"], label: Int[Array, " B"] | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "B T N"], Float[Array, " B"]]:
        """z and the log-determinant, in one pass."""
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
        mu, alpha, _ = self.parameters(before, self.position, label, train=train)
        return (x - mu) * jnp.exp(-alpha), -jnp.sum(alpha, axis=(1, 2))

    def invert(
        self, z: Float[Array, "B T N"], label: Int[Array, " B"] | None = None, sampling: Sampling = Sampling()
    ) -> Float[Array, "B T N"]:
        """x, patch after patch, each of which adds its keys and values to those of the patches before it."""
        t, stack = unrolled(self.config.transformer, self.variables["params"]["transformer"])
        block: Any = Block(replace(self.config, transformer=t), parent=None)
        length, _ = patches(self.config)
        empty = empty_cache(len(z), length, t.heads, t.width // t.heads, layers=t.depth, dtype=t.dtype)

        def parameters(
            stack: Any, label: Array | None, cache: Any, before: Array, place: Array, position: Array
        ) -> Any:
            variables = {"params": {**self.variables["params"], "transformer": stack}}
            method = partial(block.apply, variables, method="parameters")
            mu, alpha, cache = method(before[:, None], place, label, cache=cache, position=position)
            return jnp.concatenate([mu, alpha], axis=1), cache

        guided = sampling.guidance > 0
        weights = sampling.guidance * (jnp.arange(length) / max(length - 1, 1) if sampling.rising else jnp.ones(length))
        # Queries divided by the temperature divide the logits.
        other = map_with_path(
            lambda path, leaf: leaf / sampling.attention_temperature if "/query/" in path else leaf, stack
        )
        untold = None if label is None else jnp.full_like(label, self.config.classes or 0)

        def step(carry: Any, inputs: tuple[Array, Array, Array, Array]) -> Any:
            cache, other_cache, before = carry
            z, place, position, weight = inputs
            both, cache = parameters(stack, label, cache, before, place, position)
            if guided:
                others, other_cache = parameters(other, untold, other_cache, before, place, position)
                both = both + weight * (both - others)
            mu, alpha = both[:, 0], both[:, 1]
            x = z * jnp.exp(alpha) + mu
            return (cache, other_cache, x), x

        inputs = (z.swapaxes(0, 1), self.position, jnp.arange(length), weights)
        _, x = jax.lax.scan(step, (empty, empty if guided else None, jnp.zeros_like(z[:, 0])), inputs)
        return x.swapaxes(0, 1)


class TarFlow(nn.Module):
    """Patches of a real image <-> standard normal noise, by blocks that are compiled once."""

    config: Config

    def setup(self) -> None:
        self.block = Block(self.config)

    def __call__(
        self, x: Float[Array, "B T N"], label: Int[Array, " B"] | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "B T N"], Float[Array, " B"]]:
        """The noise, and the log-determinant."""

        def body(block: Block, carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            x, total = carry
            z, log_det = block(constrain(x, "batch", None, None), label, train=train)
            return (jnp.flip(z, axis=1), total + log_det), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.config.blocks,
        )
        (z, log_det), _ = scan(self.block, (x, jnp.zeros(len(x))), None)
        return z, log_det

    def invert(
        self, z: Float[Array, "B T N"], label: Int[Array, " B"] | None = None, sampling: Sampling = Sampling()
    ) -> Float[Array, "B T N"]:
        """The patches that the noise stands for."""

        def body(block: Block, z: Array, _: None) -> tuple[Array, None]:
            return block.invert(jnp.flip(constrain(z, "batch", None, None), axis=1), label, sampling), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.blocks,
            reverse=True,
        )
        return scan(self.block, z, None)[0]


def build(config: Config) -> Model:
    """A density over images, whose likelihood is bounded from below; with Gaussian noise, a sampler alone."""
    module: Any = TarFlow(config)  # linen types what `apply` returns as a union
    c, shape = config, config.shape
    conditions = label_input(c.classes)
    inputs = {"image": c.image, **conditions}

    def init(key: Array, batch: Batch) -> Variables:
        return module.init(key, patchify(to_unit_range(batch["image"], c.levels), c.patch_size), batch.get("label"))

    def log_density(
        variables: Variables, x: Float[Array, "B H W C"], label: Int[Array, " B"] | None, **settings: Any
    ) -> Float[Array, " B"]:
        z, log_det = module.apply(variables, patchify(x, c.patch_size), label, **settings)
        return standard_normal_log_density(z) + log_det

    def log_weight(variables: Variables, batch: Batch, key: Array, **settings: Any) -> Float[Array, " B"]:
        """log p(x + u), u uniform: its mean is the bound, and the mean of its exponential the probability.

        With Gaussian noise: of the noisy image on [-1, 1], which says nothing of the image's own probability.
        """
        image = batch["image"]
        if c.noise is None:
            x, log_det = to_symmetric(image, jax.random.uniform(key, image.shape), c.levels)
        else:
            x, log_det = to_unit_range(image, c.levels) + c.noise * jax.random.normal(key, image.shape), jnp.zeros(())
        return log_density(variables, x, batch.get("label"), **settings) + log_det

    def loss(
        variables: Variables, batch: Batch, key: Array, step: Array, *, train: bool
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative lower bound in bits a dimension, with one draw of the noise for an image.

        With Gaussian noise it is minus the noisy images' log-density, no bound of anything, in the same unit.
        """
        del step
        noise_key, dropout_key, label_key = jax.random.split(key, 3)
        label = training_labels(label_key, batch.get("label"), c.classes, c.class_dropout) if train else None
        if label is not None:
            batch = {**batch, "label": label}
        values = log_weight(variables, batch, noise_key, train=train, rngs={"dropout": dropout_key})
        return nats_to_bits_per_dim(jnp.mean(values), shape), Aux({}, weight=jnp.float32(len(values)))

    def sample(
        variables: Variables, key: Array, given: Batch, *, num: int, temperature: float = 1.0, sampling: Sampling
    ) -> Int[Array, "num H W C"]:
        """The temperature multiplies the noise.

        Raises:
          UserError: `sampling` has guidance with nothing to go away from.
        """
        if sampling.guidance and c.classes is None and sampling.attention_temperature == 1:
            raise UserError(
                "guidance goes away from what a model without a class would do and this one is told none: set "
                "sampling.attention_temperature to another value than 1, or sampling.guidance to 0"
            )
        noise_key, label_key = jax.random.split(key)
        label = sampling_labels(label_key, given.get("label"), c.classes, num)
        z = temperature * jax.random.normal(noise_key, (num, *patches(c)))
        x = unpatchify(module.apply(variables, z, label, sampling, method="invert"), c.patch_size, c.channels)
        if c.noise is None:
            return from_symmetric(x, c.levels)
        # The mean of the image given the noisy one, by Tweedie's formula (section 2.4 of the paper).
        score = jax.grad(lambda x: jnp.sum(log_density(variables, x, label)))(x)
        return from_unit_range(x + c.noise**2 * score, c.levels)

    rules = (
        (r"embed/kernel$", (None, "embed")),
        (r"embed/bias$", (None,)),
        (r"(position|label)$" if c.classes is not None else r"position$", (None, None)),
        (r"affine/kernel$", ("embed", None)),
        (r"affine/bias$", (None,)),
        *TRANSFORMER_RULES,
    )
    return Model(
        inputs=inputs,
        init=init,
        loss=loss,
        rules=rules,
        log_likelihood=log_weight if c.noise is None else None,
        count=subpixels if c.noise is None else None,
        bound="lower" if c.noise is None else None,
        dequantisation="uniform" if c.noise is None else None,
        log_weight=log_weight if c.noise is None else None,
        conditions=conditions,
        sampling=Sampling(),
        sample=sample,
    )
