"""The spatial transformer of latent diffusion (2112.10752, appendix E.2.1): a map that reads a text."""

import flax.linen as nn
from jaxtyping import Array, Float

from vlm_jax.contract import Rule
from vlm_jax.nn.attention import Attention
from vlm_jax.nn.conditioning import Text
from vlm_jax.nn.convolution import GroupNorm
from vlm_jax.sharding import constrain

NORM_EPS = 1e-5
"""Of the layer norms; that of the group norm is 1e-6."""


class GEGLU(nn.Module):
    """down(up(x) * gelu(gate(x))), the GELU exact, of four times the width (2002.05202)."""

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        up, gate = (nn.Dense(4 * width, dtype=self.dtype, name=name)(x) for name in ("up", "gate"))
        hidden = constrain(up * nn.gelu(gate, approximate=False), "batch", None, "mlp")
        return nn.Dense(width, dtype=self.dtype, name="down")(hidden)


class SpatialTransformer(nn.Module):
    """Attention of a map's positions to each other, then to a text, then a layer of their own; starts as the identity.

    Without a text the second attention is to the map, too. A text's padding is attended to, as in the release.
    """

    heads: int
    groups: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], text: Text | None, *, train: bool) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(NORM_EPS, dtype=self.dtype, name=name)

        def attention(name: str) -> Attention:
            return Attention(channels, self.heads, dtype=self.dtype, qkv_bias=False, name=name)

        dropout = nn.Dropout(self.dropout, deterministic=not train)
        y = GroupNorm(self.groups, self.dtype, name="norm")(x).reshape(batch, height * width, channels)
        y = constrain(nn.Dense(channels, dtype=self.dtype, name="into")(y), "batch", None, None)
        y = y + dropout(attention("to_map")(norm("map_norm")(y))[0])
        context = None if text is None else text.features.astype(self.dtype)
        y = y + dropout(attention("to_text")(norm("text_norm")(y), context)[0])
        y = y + dropout(GEGLU(self.dtype, name="mlp")(norm("mlp_norm")(y)))
        y = nn.Dense(channels, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="out")(y)
        return constrain(x + y.reshape(x.shape), "batch", None, None, None)


SPATIAL_TRANSFORMER_RULES: tuple[Rule, ...] = (
    (r"to_(map|text)/(query|key|value)/kernel$", ("embed", "heads")),
    (r"to_(map|text)/out/kernel$", ("heads", "embed")),
    (r"mlp/(up|gate)/kernel$", ("embed", "mlp")),
    (r"mlp/(up|gate)/bias$", ("mlp",)),
    (r"mlp/down/kernel$", ("mlp", "embed")),
    (r"into/kernel$", (None, "filters")),
)
