"""The layers of coupling flows.

A layer maps `(x, inverse)` to the transformed x and the log-determinant, one an image, of the map that it applied:
the inverse's is the negative of the forward's. Maps and determinants are computed in fp32; only the networks that
predict the parameters of a coupling may run in another dtype.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.nn.convolution import unroll
from vlm_jax.sharding import constrain

Image = Float[Array, "B H W C"]
Half = Float[Array, "B H W c"]
Context = Float[Array, "B H W E"]
LogDet = Float[Array, " B"]

MAX_LOG_SCALE = 2.0
"""One layer stretches or shrinks a dimension at most by exp(2). A sigmoid's scale, at most 1 or 2, would cap what N
layers expand at 2^N, and N of them may not do for data of small variance."""


def squeeze(x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    """Each 2x2 square of pixels becomes the channels of one: half the height and width (1605.08803)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def unsqueeze(x: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
    """The inverse of `squeeze`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).swapaxes(2, 3)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


class ActNorm(nn.Module):
    """A scale and shift of each channel, initialised to give the first batch zero mean and unit variance (Glow)."""

    @nn.compact
    def __call__(self, x: Image, *, inverse: bool = False) -> tuple[Image, LogDet]:
        x = x.astype(jnp.float32)
        mean, variance = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
        log_scale = self.param("log_scale", lambda _: -0.5 * jnp.log(variance + 1e-6))
        shift = self.param("shift", lambda _: -mean * jax.lax.rsqrt(variance + 1e-6))
        log_det = jnp.full(len(x), x.shape[1] * x.shape[2]) * jnp.sum(log_scale)
        if inverse:
            return (x - shift) * jnp.exp(-log_scale), -log_det
        return x * jnp.exp(log_scale) + shift, log_det


class InvertibleConv(nn.Module):
    """A product of each pixel's channels with P L U: a fixed permutation, unit lower and upper triangular (Glow).

    It starts as a random orthogonal matrix. The permutation is no parameter and stands in the collection `constants`.
    """

    @nn.compact
    def __call__(self, x: Image, *, inverse: bool = False) -> tuple[Image, LogDet]:
        channels = x.shape[-1]
        eye = jnp.eye(channels)

        permutations: list[Array] = []  # of the factorisation that is drawn, whose other part trains

        def rotation(key: Array) -> dict[str, Array]:
            permutation, lower, upper = jax.scipy.linalg.lu(nn.initializers.orthogonal()(key, (channels, channels)))
            permutations.append(permutation)
            diagonal = jnp.sum(upper * eye, axis=0)
            # Columns change their signs, which keeps it orthogonal, so that the diagonal has a logarithm.
            upper = upper * jnp.sign(diagonal)
            return {"lower": lower, "upper": upper, "log_diagonal": jnp.log(jnp.abs(diagonal))}

        lu = self.param("lu", rotation)
        permutation = self.variable("constants", "permutation", lambda: permutations[-1]).value
        log_diagonal = lu["log_diagonal"]
        lower = jnp.tril(lu["lower"], -1) + eye
        upper = jnp.triu(lu["upper"], 1) + eye * jnp.exp(log_diagonal)
        log_det = jnp.full(len(x), x.shape[1] * x.shape[2]) * jnp.sum(log_diagonal)
        if inverse:
            y = x.reshape(-1, channels) @ permutation
            y = jax.scipy.linalg.solve_triangular(lower, y.T, lower=True, unit_diagonal=True)
            return jax.scipy.linalg.solve_triangular(upper, y).T.reshape(x.shape), -log_det
        # In full precision: what an accelerator makes of fp32 by default would be another map than the inverse's.
        matrix = jnp.linalg.multi_dot([permutation, lower, upper], precision="highest")
        return jnp.einsum("bhwc,dc->bhwd", x, matrix, precision="highest"), log_det


def affine(x: Image, outputs: Float[Array, "B H W C 2"], *, inverse: bool) -> tuple[Image, LogDet]:
    """x exp(s) + t, elementwise; both of them zero where the network's outputs are."""
    log_scale = MAX_LOG_SCALE * jnp.tanh(outputs[..., 0] / MAX_LOG_SCALE)
    log_det = jnp.sum(log_scale, axis=(1, 2, 3))
    if inverse:
        return (x - outputs[..., 1]) * jnp.exp(-log_scale), -log_det
    return x * jnp.exp(log_scale) + outputs[..., 1], log_det


def mixture_logit(x: Image, parameters: Float[Array, "B H W C K 3"]) -> tuple[Image, Image]:
    """logit F(x) of a mixture of logistics' distribution function F, and the logarithm of its derivative.

    In logarithms throughout: exact in the tails, where it is linear with the slope of the widest logistic.
    """
    log_weights = jax.nn.log_softmax(parameters[..., 0])
    log_scales = MAX_LOG_SCALE * jnp.tanh(parameters[..., 2] / MAX_LOG_SCALE)
    distance = (x[..., None] - parameters[..., 1]) * jnp.exp(-log_scales)
    below, above = jax.nn.log_sigmoid(distance), jax.nn.log_sigmoid(-distance)
    log_below = jax.nn.logsumexp(log_weights + below, axis=-1)
    log_above = jax.nn.logsumexp(log_weights + above, axis=-1)
    log_density = jax.nn.logsumexp(log_weights + below + above - log_scales, axis=-1)
    return log_below - log_above, log_density - log_below - log_above


def mixture_logit_inverse(y: Image, parameters: Float[Array, "B H W C K 3"]) -> Image:
    """Bisection, between the least and the greatest of what each logistic alone would give."""
    alone = parameters[..., 1] + y[..., None] * jnp.exp(MAX_LOG_SCALE * jnp.tanh(parameters[..., 2] / MAX_LOG_SCALE))

    def halve(_: int, bracket: tuple[Image, Image]) -> tuple[Image, Image]:
        low, high = bracket
        middle = (low + high) / 2
        below = mixture_logit(middle, parameters)[0] < y
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (jnp.min(alone, axis=-1), jnp.max(alone, axis=-1)))
    return (low + high) / 2


def transform(x: Image, outputs: Float[Array, "B H W O"], mixtures: int, *, inverse: bool) -> tuple[Image, LogDet]:
    """An increasing function of each element, whose parameters are a network's outputs.

    Affine (RealNVP, 1605.08803), or with `mixtures` the logit of a mixture of logistics' distribution function before
    that (Flow++, 1902.00275), which may have several modes.
    """
    outputs = outputs.astype(jnp.float32).reshape(*x.shape, 2 + 3 * mixtures)
    if not mixtures:
        return affine(x, outputs, inverse=inverse)
    parameters = outputs[..., 2:].reshape(*x.shape, mixtures, 3)
    if inverse:
        y, log_det = affine(x, outputs[..., :2], inverse=True)
        x = mixture_logit_inverse(y, parameters)
        return x, log_det - jnp.sum(mixture_logit(x, parameters)[1], axis=(1, 2, 3))
    y, log_slope = mixture_logit(x, parameters)
    y, log_det = affine(y, outputs[..., :2], inverse=False)
    return y, log_det + jnp.sum(log_slope, axis=(1, 2, 3))


def spread_means(channels: int, mixtures: int) -> nn.initializers.Initializer:
    """The bias of a network for `transform`: zero, but that a mixture's logistics stand apart, else they stay one."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        parameters = jnp.zeros((mixtures, 3)).at[:, 1].set(jnp.linspace(-2, 2, mixtures))
        return jnp.tile(jnp.concatenate([jnp.zeros(2), parameters.ravel()]), channels).astype(dtype)

    return init


class CouplingNet(nn.Module):
    """Glow's: convolutions 3x3, 1x1 and 3x3, the hidden ones normalised by `ActNorm`; the last starts at zero."""

    width: int
    channels: int
    """That it predicts a transformation of."""
    mixtures: int = 0
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Image, *, train: bool = False) -> Float[Array, "B H W O"]:
        for name, window in (("in", (3, 3)), ("hidden", (1, 1))):
            x = nn.Conv(self.width, window, use_bias=False, dtype=self.dtype, name=f"conv_{name}")(x)
            x = nn.relu(ActNorm(name=f"norm_{name}")(constrain(x, "batch", None, None, None))[0])
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Conv(
            self.channels * (2 + 3 * self.mixtures),
            (3, 3),
            kernel_init=nn.initializers.zeros,
            bias_init=spread_means(self.channels, self.mixtures),
            dtype=self.dtype,
            name="parameters",
        )(x)


class Coupling(nn.Module):
    """Transforms half of the channels by functions of the other half, and of a context if there is one."""

    width: int
    mixtures: int = 0
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Image, context: Context | None = None, *, inverse: bool = False, train: bool = False
    ) -> tuple[Image, LogDet]:
        kept, changed = jnp.split(x, [x.shape[-1] // 2], axis=-1)
        condition = kept if context is None else jnp.concatenate([kept, context], axis=-1)
        net = CouplingNet(self.width, changed.shape[-1], self.mixtures, self.dropout, self.dtype, name="net")
        changed, log_det = transform(changed, net(condition, train=train), self.mixtures, inverse=inverse)
        return jnp.concatenate([kept, changed], axis=-1), log_det


def in_turn(x: Image, *layers: Callable[..., tuple[Image, LogDet]], inverse: bool) -> tuple[Image, LogDet]:
    """The layers one after the other; their inverses from the last on."""
    log_dets = []
    for layer in reversed(layers) if inverse else layers:
        x, log_det = layer(x, inverse=inverse)
        log_dets.append(log_det)
    return x, sum(log_dets[1:], log_dets[0])


class Split(nn.Module):
    """Gives up half of the channels as base noise, standardised by a convolution of those that go on (Glow).

    Its inverse takes `(kept, noise)` for x.
    """

    @nn.compact
    def __call__(self, x: Image, noise: Half | None = None) -> tuple[Half, Half, LogDet]:
        """The channels that go on, the others, and the log-determinant; of given noise, the inverse."""
        kept, other = jnp.split(x, 2, axis=-1) if noise is None else (x, noise)
        init = nn.initializers.zeros
        outputs = nn.Conv(2 * kept.shape[-1], (3, 3), kernel_init=init, name="parameters")(kept)
        other, log_det = transform(other, outputs, 0, inverse=noise is not None)
        return kept, other, log_det


class Step(nn.Module):
    """Of Glow: actnorm, invertible convolution, coupling."""

    width: int
    mixtures: int = 0
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Image, context: Context | None = None, *, inverse: bool = False, train: bool = False
    ) -> tuple[Image, LogDet]:
        coupling = Coupling(self.width, self.mixtures, self.dropout, self.dtype, name="coupling")
        told = partial(coupling, context=context, train=train)
        return in_turn(x, ActNorm(name="norm"), InvertibleConv(name="convolution"), told, inverse=inverse)


class Repeated(nn.Module):
    """`depth` steps, compiled once."""

    step: Callable[..., nn.Module]
    """Makes a step."""
    depth: int

    @nn.compact
    def __call__(
        self, x: Image, context: Context | None = None, *, inverse: bool = False, train: bool = False
    ) -> tuple[Image, LogDet]:
        def body(step: nn.Module, carry: tuple[Image, LogDet]) -> tuple[tuple[Image, LogDet], None]:
            x, log_det = carry
            x, more = step(constrain(x, "batch", None, None, None), context, inverse=inverse, train=train)
            return (x, log_det + more), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "constants": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            reverse=inverse,
            unroll=unroll(self.depth),
        )
        (x, log_det), _ = scan(self.step(name="step"), (x.astype(jnp.float32), jnp.zeros(len(x))))
        return x, log_det


class MultiScale(nn.Module):
    """Squeeze, steps, split, at one resolution after another (1605.08803): an image <-> standard normal noise."""

    step: Callable[..., nn.Module]
    """Makes a step."""
    depth: int
    """Steps at each resolution."""
    scales: int
    """Resolutions, each half the one before; the first is half the image's."""

    def setup(self) -> None:
        self.steps = [Repeated(self.step, self.depth) for _ in range(self.scales)]
        self.splits = [Split() for _ in range(self.scales - 1)]
        self.last = ActNorm()

    def __call__(self, x: Image, *, train: bool = False) -> tuple[Float[Array, "B D"], LogDet]:
        """Noise, and the log-determinant."""
        noise, total = [], jnp.zeros(len(x))
        for scale, steps in enumerate(self.steps):
            x, log_det = steps(squeeze(x), train=train)
            total = total + log_det
            if scale < len(self.splits):
                x, other, log_det = self.splits[scale](x)
                noise.append(other)
                total = total + log_det
        x, log_det = self.last(x)
        return jnp.concatenate([part.reshape(len(x), -1) for part in (*noise, x)], axis=1), total + log_det

    def invert(self, noise: Float[Array, "B D"], shape: tuple[int, int, int]) -> Image:
        """The image, of the given shape, that `noise` stands for."""
        height, width, channels = shape
        shapes = []
        for scale in range(self.scales):
            height, width, channels = height // 2, width // 2, 4 * channels
            if scale < len(self.splits):
                channels = channels // 2
            shapes.append((height, width, channels))
        ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
        parts = [
            part.reshape(len(noise), *shape)
            for part, shape in zip(jnp.split(noise, ends[:-1], axis=1), shapes, strict=True)
        ]
        x, _ = self.last(parts[-1], inverse=True)
        for scale in reversed(range(self.scales)):
            if scale < len(self.splits):
                x = jnp.concatenate(self.splits[scale](x, parts[scale])[:2], axis=-1)
            x, _ = self.steps[scale](x, inverse=True)
            x = unsqueeze(x)
        return x


def flow_rules(scales: int) -> tuple[Rule, ...]:
    """Sharding rules of a `MultiScale`. A split's convolution has few channels and lies everywhere."""
    return (
        (r"conv_(in|hidden)/kernel$", (None, "filters")),
        *(((r"splits_\d+/parameters/kernel$", (None, None)),) if scales > 1 else ()),
        (r"parameters/kernel$", ("embed", None)),
        (r"parameters/bias$", (None,)),
        (r"lu/(lower|upper)$", (None, None)),
        (r"lu/log_diagonal$", (None,)),
        (r"(log_scale|shift)$", (None,)),
    )
