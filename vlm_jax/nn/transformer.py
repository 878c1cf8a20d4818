"""The transformer stack that every transformer family uses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax.errors import UserError
from vlm_jax.nn.attention import ATTENTION_RULES, Attention, Cache, Slot
from vlm_jax.nn.stack import StackConfig, stack
from vlm_jax.sharding import constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
}


@dataclass(frozen=True, kw_only=True)
class Transformer(StackConfig):
    """Sizes of a stack of blocks with layer norms and one activation between two layers."""

    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu_tanh"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise UserError(
                f"a transformer of width {self.width} cannot be split into {self.heads} heads: "
                f"choose heads that divide the width"
            )


def feature_layers(config: StackConfig, left_out: int) -> int | None:
    """`layers` of a stack whose last blocks features know nothing of.

    Raises:
      UserError: there are not so many blocks.
    """
    if left_out > config.depth:
        raise UserError(f"features is {left_out} and there are depth={config.depth} blocks to leave out: choose fewer")
    return config.depth - left_out if left_out else None


class MLP(nn.Module):
    """Two layers with an activation between them."""

    width: int
    hidden: int
    activation: str
    output_scale: float = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        x = constrain(nn.Dense(self.hidden, dtype=self.dtype, name="up")(x), "batch", None, "mlp")
        init = nn.initializers.variance_scaling(self.output_scale, "fan_in", "normal")
        return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="down")(ACTIVATIONS[self.activation](x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: Transformer

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "#B #H T _"] | None,
        slot: Slot,
        causal: bool,
        train: bool,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        # Each of the 2 * depth branches adds its share of variance, so that the sum's does not grow with depth.
        scale = 1 / (2 * c.depth)
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        x = constrain(x, "batch", None, None)
        y = nn.LayerNorm(c.norm_eps, dtype=c.dtype, name="attention_norm")(x)
        attention = Attention(c.width, c.heads, scale, c.dtype, name="attention")
        y, cache = attention(y, mask=mask, causal=causal, cache=cache, slot=slot)
        x = x + dropout(y)
        y = nn.LayerNorm(c.norm_eps, dtype=c.dtype, name="mlp_norm")(x)
        x = x + dropout(MLP(c.width, c.mlp, c.activation, scale, c.dtype, name="mlp")(y))
        return x, cache


class TransformerStack(nn.Module):
    """`depth` blocks and a final norm."""

    config: Transformer

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "#B #H T _"] | None = None,
        causal: bool = False,
        cache: tuple[Cache, ...] | None = None,
        slot: Slot = 0,
        layers: int | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...] | None]:
        """With a `cache` of `depth` layers, `x` are the tokens from `slot` on; the layers are then `unrolled`.

        With `layers` it ends after the first so many, before any norm.
        """
        c = self.config
        x, cache = stack(Block, c, x.astype(c.dtype), mask, slot, causal, train, cache=cache, layers=layers)
        if layers is not None:
            return x, cache
        return nn.LayerNorm(c.norm_eps, dtype=c.dtype, name="final_norm")(constrain(x, "batch", None, None)), cache


TRANSFORMER_RULES = (
    *ATTENTION_RULES,
    (r"up/kernel$", ("embed", "mlp")),
    (r"up/bias$", ("mlp",)),
    (r"down/kernel$", ("mlp", "embed")),
    (r"down/bias$", (None,)),
    (r"norm/(scale|bias)$", (None,)),
)
