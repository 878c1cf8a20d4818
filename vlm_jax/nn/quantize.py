"""Vector quantisers: features -> codes, and what the codes stand for.

Each reads features [*B, D] and says of each position which of K codes it is, what the decoder reads in its place, and
what it costs to be far from a code. What the decoder reads has the features' gradient.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.nn.codebook import Gradient, clusters, k_means, nearest, squares, unit_length, with_gradient

FSQ_EPSILON = 1e-3
"""How much narrower the outermost values are than the range of their levels (2309.15505, appendix A.1)."""


class Quantised(NamedTuple):
    """Features, quantised."""

    value: Float[Array, "*B D"]
    """What the codes stand for, with the features' gradient."""
    codes: Int[Array, "*C"]
    """[*B], or [*B, books] where there are several."""
    penalty: Float[Array, ""]
    """What the loss has for them in training, a mean over positions and features."""


class Quantizer(Protocol):
    """What the settings of each say."""

    @property
    def size(self) -> int:
        """Codes, of each book."""

    @property
    def width(self) -> int:
        """Features of a position."""

    @property
    def books(self) -> int:
        """Codes of a position."""


class Single:
    """One code a position."""

    books = 1


@dataclass(frozen=True, kw_only=True)
class EMA(Single):
    """A codebook of moving averages of the features that it stands for (1711.00937, appendix A.1)."""

    size: int
    width: int
    decay: float = 0.99
    epsilon: float = 1e-5
    """Of the Laplace smoothing of counts."""
    commitment: float = 0.25
    restart: float = 2.0
    """Features of a batch that a code stands for, on average, below which it is set to one of the batch's at random
    (2005.00341); 0: never."""
    gradient: Gradient = "straight_through"


@dataclass(frozen=True, kw_only=True)
class Learned(Single):
    """A codebook that learns from the gradient of its distance to the features (1711.00937; 2012.09841)."""

    size: int
    width: int
    unit: bool = False
    """Features and codes have unit length (2110.04627), which keeps all of a large codebook of few features in use."""
    commitment: float = 0.25
    gradient: Gradient = "straight_through"


@dataclass(frozen=True, kw_only=True)
class SimVQ(Single):
    """A codebook drawn once, of which one learned matrix turns and stretches all vectors together (2411.02038)."""

    size: int
    width: int
    commitment: float = 0.25
    gradient: Gradient = "straight_through"


@dataclass(frozen=True, kw_only=True)
class FSQ(Single):
    """Each feature is rounded to one of a few levels: the codes are their products, and there is nothing to learn
    (2309.15505). About 2^8 codes: 8 6 5; 2^10: 8 5 5 5; 2^12: 7 5 5 5 5; 2^14: 8 8 8 6 5; 2^16: 8 8 8 5 5 5."""

    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 3:
            raise UserError(f"the levels of FSQ are {list(self.levels)}: each must be at least 3; LFQ has two of each")

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        return len(self.levels)


@dataclass(frozen=True, kw_only=True)
class LFQ(Single):
    """Each feature is rounded to 1 or -1 (2310.05737); an entropy makes each decided and all codes used."""

    width: int
    entropy: float = 0.1
    commitment: float = 0.25
    inverse_temperature: float = 100.0

    @property
    def size(self) -> int:
        return 2**self.width


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Several books, each of what the ones before it leave (2203.01941, 2107.03312)."""

    book: EMA | Learned | SimVQ | FSQ | LFQ
    books: int
    dropout: float = 0.0
    """Share of training batches of which some of the last books are left out, evenly drawn how many."""

    def __post_init__(self) -> None:
        if self.books < 2:
            raise UserError(
                f"a residual quantiser has {self.books} books: it must have 2 at least; take its book alone"
            )

    @property
    def size(self) -> int:
        return self.book.size

    @property
    def width(self) -> int:
        return self.book.width


class EMACodebook(nn.Module):
    """How many features each code has, and their sum, in the collection `codebook`; a code is their quotient."""

    config: EMA

    @nn.compact
    def __call__(self, z: Float[Array, "*B D"], *, train: bool = False) -> Quantised:
        c = self.config
        z = jnp.asarray(z, jnp.float32)
        flat = jax.lax.stop_gradient(z).reshape(-1, c.width)

        def start() -> dict[str, Array]:
            centres, count = k_means(self.make_rng("params"), flat, c.size)
            count = jnp.maximum(count, 1)
            return {"count": count, "total": count[:, None] * centres}

        state = self.variable("codebook", "clusters", start)
        vectors = self.vectors(**state.value)
        codes = nearest(flat, vectors)
        q = vectors[codes].reshape(z.shape)
        if train and not self.is_initializing():
            found = dict(zip(("count", "total"), clusters(flat, codes, c.size), strict=True))
            count, total = (c.decay * state.value[name] + (1 - c.decay) * new for name, new in found.items())
            if c.restart:
                low = count < c.restart
                drawn = flat[jax.random.randint(self.make_rng("codes"), (c.size,), 0, len(flat))]
                total = jnp.where(low[:, None], c.restart * drawn, total)
                count = jnp.where(low, c.restart, count)
            state.value = {"count": count, "total": total}
        return Quantised(with_gradient(z, q, c.gradient), codes.reshape(z.shape[:-1]), c.commitment * squares(z, q))

    def vectors(self, count: Float[Array, " K"], total: Float[Array, "K D"]) -> Float[Array, "K D"]:
        c, n = self.config, jnp.sum(count)
        smoothed = n * (count + c.epsilon) / (n + c.size * c.epsilon)
        return total / smoothed[:, None]

    def look_up(self, codes: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.vectors(**self.get_variable("codebook", "clusters"))[codes]


class LearnedCodebook(nn.Module):
    """`vectors` are parameters."""

    config: Learned

    @nn.compact
    def __call__(self, z: Float[Array, "*B D"], *, train: bool = False) -> Quantised:
        del train
        c = self.config
        z = self.sized(jnp.asarray(z, jnp.float32))
        vectors = self.sized(self.param("vectors", lambda key: k_means(key, z.reshape(-1, c.width), c.size)[0]))
        return learned(z, vectors, c.commitment, c.gradient)

    def sized(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return unit_length(x) if self.config.unit else x

    def look_up(self, codes: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return self.sized(self.get_variable("params", "vectors"))[codes]


class SimVQCodebook(nn.Module):
    """`drawn` vectors in the collection `constants`, and the matrix that learns."""

    config: SimVQ

    @nn.compact
    def __call__(self, z: Float[Array, "*B D"], *, train: bool = False) -> Quantised:
        del train
        c = self.config
        shape, normal = (c.size, c.width), nn.initializers.normal(c.width**-0.5)
        drawn = self.variable("constants", "drawn", lambda: normal(self.make_rng("params"), shape))
        matrix = self.param("matrix", nn.initializers.orthogonal(), (c.width, c.width))
        return learned(jnp.asarray(z, jnp.float32), drawn.value @ matrix, c.commitment, c.gradient)

    def look_up(self, codes: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return (self.get_variable("constants", "drawn") @ self.get_variable("params", "matrix"))[codes]


def learned(z: Float[Array, "*B D"], vectors: Float[Array, "K D"], commitment: float, gradient: Gradient) -> Quantised:
    """The codes move to the features, and, `commitment` times as much, the features to the codes (equation 3)."""
    codes = nearest(z, vectors)
    q = vectors[codes]
    return Quantised(with_gradient(z, q, gradient), codes, squares(q, z) + commitment * squares(z, q))


class FiniteScalars(nn.Module):
    """`FSQ`. The values of a feature lie evenly within [-1, 1]."""

    config: FSQ

    def __call__(self, z: Float[Array, "*B D"], *, train: bool = False) -> Quantised:
        del train
        levels = jnp.array(self.config.levels)
        half, offset = (levels - 1) * (1 - FSQ_EPSILON) / 2, jnp.where(levels % 2, 0, 0.5)
        bounded = jnp.tanh(z.astype(jnp.float32) + jnp.arctanh(offset / half)) * half - offset
        rounded = with_gradient(bounded, jnp.round(bounded))
        digits = jax.lax.stop_gradient(rounded).astype(jnp.int32) + levels // 2
        codes = jnp.sum(digits * self.basis, axis=-1, dtype=jnp.int32)
        return Quantised(rounded / (levels // 2), codes, jnp.zeros(()))

    @property
    def basis(self) -> Int[Array, " D"]:
        """What a level of each feature counts in a code."""
        return jnp.cumprod(jnp.array([1, *self.config.levels[:-1]]))

    def look_up(self, codes: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        levels = jnp.array(self.config.levels)
        return (codes[..., None] // self.basis % levels - levels // 2) / jnp.float32(levels // 2)


class SignBits(nn.Module):
    """`LFQ`."""

    config: LFQ

    def __call__(self, z: Float[Array, "*B D"], *, train: bool = False) -> Quantised:
        del train
        c = self.config
        z = jnp.asarray(z, jnp.float32)
        q = jnp.where(z > 0, 1.0, -1.0)
        codes = jnp.sum((z > 0) * 2 ** jnp.arange(c.width), axis=-1, dtype=jnp.int32)
        # Of softmax(-t |z - c|^2) over all codes c: |z - c|^2 is a constant less 2 z c.
        logits = 2 * c.inverse_temperature * jnp.einsum("...d,kd->...k", z, self.look_up(jnp.arange(c.size)))
        log_p = jax.nn.log_softmax(logits).reshape(-1, c.size)
        mean = jnp.mean(jnp.exp(log_p), axis=0)
        decided = -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))
        used = -jnp.sum(mean * jnp.log(mean + 1e-10))
        penalty = c.entropy * (decided - used) + c.commitment * squares(z, q)
        return Quantised(with_gradient(z, q), codes, penalty)

    def look_up(self, codes: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        bits = codes[..., None] // 2 ** jnp.arange(self.config.width) % 2
        return 2 * bits.astype(jnp.float32) - 1


class ResidualBooks(nn.Module):
    """`Residual`: the value is the sum of what its books stand for."""

    config: Residual

    def setup(self) -> None:
        self.parts = [quantizer(self.config.book) for _ in range(self.config.books)]

    def __call__(self, z: Float[Array, "*B D"], *, train: bool = False) -> Quantised:
        c = self.config
        kept: Any = c.books
        if train and c.dropout:
            drop_key, count_key = jax.random.split(self.make_rng("codes"))
            fewer = jax.random.randint(count_key, (), 1, c.books)
            kept = jnp.where(jax.random.bernoulli(drop_key, c.dropout), fewer, c.books)
        rest, total = z.astype(jnp.float32), jnp.zeros(z.shape)
        codes, penalty = [], jnp.zeros(())
        for i, part in enumerate(self.parts):
            found = part(rest, train=train)
            used = jnp.asarray(i < kept, jnp.float32)
            still = jax.lax.stop_gradient(found.value)
            rest, total = rest - still, total + used * still
            codes.append(found.codes)
            penalty = penalty + used * found.penalty / c.books
        return Quantised(with_gradient(z, total), jnp.stack(codes, axis=-1), penalty)

    def look_up(self, codes: Int[Array, "*B R"]) -> Float[Array, "*B D"]:
        return sum((part.look_up(codes[..., i]) for i, part in enumerate(self.parts)), jnp.zeros(()))


MODULES: dict[type, Any] = {
    EMA: EMACodebook,
    Learned: LearnedCodebook,
    SimVQ: SimVQCodebook,
    FSQ: FiniteScalars,
    LFQ: SignBits,
    Residual: ResidualBooks,
}


def quantizer(config: Quantizer) -> Any:
    """The module of settings: called with features it is `Quantised`, and `look_up` says what codes stand for."""
    return MODULES[type(config)](config)


def quantizer_rules(config: Quantizer) -> tuple[Rule, ...]:
    """Sharding rules of a quantiser's parameters, which most have none of."""
    kind = type(config.book if isinstance(config, Residual) else config)
    rules: dict[type, tuple[Rule, ...]] = {
        Learned: ((r"vectors$", ("components", None)),),
        SimVQ: ((r"matrix$", (None, None)),),
    }
    return rules.get(kind, ())
