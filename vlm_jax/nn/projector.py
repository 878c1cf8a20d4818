"""From the vectors of an image's patches to those that a language model reads."""

import math
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.sharding import constrain

Kind = Literal["mlp2x_gelu", "linear"]
"""mlp2x_gelu: two layers with an exact GELU between them (LLaVA-1.5: 2310.03744). linear: one (LLaVA: 2304.08485)."""


def pixel_shuffle(x: Float[Array, "B T D"], factor: int) -> Float[Array, "B S E"]:
    """The vectors of each square of factor x factor patches as one, row by row: fewer, wider tokens (2504.05299).

    Patches and squares are in raster order.
    """
    batch, count, width = x.shape
    side = math.isqrt(count)
    x = x.reshape(batch, side // factor, factor, side // factor, factor, width)
    return x.swapaxes(2, 3).reshape(batch, count // factor**2, factor**2 * width)


class Projector(nn.Module):
    """Patches of the image tower -> tokens of the language model."""

    width: int
    kind: Kind
    shuffle: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B S E"]:
        if self.shuffle > 1:
            x = pixel_shuffle(x, self.shuffle)
        if self.kind == "mlp2x_gelu":
            x = constrain(nn.Dense(self.width, dtype=self.dtype, name="hidden")(x), "batch", None, "mlp")
            x = nn.gelu(x, approximate=False)
        return constrain(nn.Dense(self.width, dtype=self.dtype, name="out")(x), "batch", None, None)


def projector_rules(kind: Kind) -> tuple[Rule, ...]:
    """Sharding rules of a `Projector`."""
    out: tuple[Rule, ...] = ((r"out/bias$", (None,)),)
    if kind == "linear":
        return ((r"out/kernel$", (None, "embed")), *out)
    return (
        (r"hidden/kernel$", ("embed", "mlp")),
        (r"hidden/bias$", ("mlp",)),
        (r"out/kernel$", ("mlp", "embed")),
        *out,
    )
