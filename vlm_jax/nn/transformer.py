"""The transformer stack that every transformer family uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import UserError
from vlm_jax.nn.attention import ATTENTION_RULES, Attention, Cache
from vlm_jax.nn.remat import Remat, rematerialised
from vlm_jax.sharding import constrain
from vlm_jax.trees import unstack

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
}


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes of a stack of pre-norm blocks."""

    width: int
    depth: int
    heads: int
    mlp: int
    """Hidden units of each feed-forward layer."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu_tanh"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    """Share of each residual branch's output that is dropped in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters are float32."""
    scan: bool = True
    """Compile one block and loop over the layers; False unrolls them."""
    remat: Remat = "none"
    """What to compute again in the backward pass instead of keeping it: nothing, all but products, or each block."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise UserError(
                f"a transformer of width {self.width} cannot be split into {self.heads} heads: "
                f"choose heads that divide the width"
            )


class MLP(nn.Module):
    """Two layers with an activation between them."""

    width: int
    hidden: int
    activation: str
    output_scale: float = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
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
        cache: Cache | None,
        mask: Bool[Array, "#B #H T S"] | None,
        position: Int[Array, ""] | int,
        causal: bool,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        # Each of the 2 * depth branches adds its share of variance, so that the sum's does not grow with depth.
        scale = 1 / (2 * c.depth)
        dropout = nn.Dropout(c.dropout, deterministic=not train)
        x = constrain(x, "batch", None, None)
        y = nn.LayerNorm(c.norm_eps, dtype=c.dtype, name="attention_norm")(x)
        attention = Attention(c.width, c.heads, scale, c.dtype, name="attention")
        y, cache = attention(y, mask=mask, causal=causal, cache=cache, position=position)
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
        mask: Bool[Array, "#B #H T S"] | None = None,
        causal: bool = False,
        cache: tuple[Cache, ...] | None = None,
        position: Int[Array, ""] | int = 0,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...] | None]:
        """With a `cache` of `depth` layers, `x` are the tokens from `position` on; the layers are `unrolled` then."""
        c = self.config
        assert cache is None or not c.scan
        x = x.astype(c.dtype)
        block = rematerialised(Block, c.remat, scan=c.scan, static_argnums=(5, 6))
        if c.scan:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=c.depth,
            )
            x, _ = scanned(c, name="blocks")(x, None, mask, position, causal, train)
        else:
            layers: list[Any] = [None] * c.depth if cache is None else list(cache)
            for i in range(c.depth):
                x, layers[i] = block(c, name=f"block_{i}")(x, layers[i], mask, position, causal, train)
                if cache is not None:
                    # As between scanned layers, so that the inverse of a bfloat16 flow rounds what the flow rounded.
                    x = jax.lax.optimization_barrier(x)
            cache = None if cache is None else tuple(layers)
        return nn.LayerNorm(c.norm_eps, dtype=c.dtype, name="final_norm")(constrain(x, "batch", None, None)), cache


def unrolled(config: Transformer, params: Mapping[str, Any]) -> tuple[Transformer, dict[str, Any]]:
    """The same stack for decoding: its layers one after the other, each with parameters and a cache of its own.

    Called before a loop over tokens: a scan over layers within it would copy every layer's parameters for each token.
    """
    return replace(config, scan=False), unstack(params, "blocks", "block")


TRANSFORMER_RULES = (
    *ATTENTION_RULES,
    (r"up/kernel$", ("embed", "mlp")),
    (r"up/bias$", ("mlp",)),
    (r"down/kernel$", ("mlp", "embed")),
    (r"down/bias$", (None,)),
    (r"norm/(scale|bias)$", (None,)),
)
