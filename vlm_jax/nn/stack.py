"""A stack of equal layers: compiled once and looped over or one after the other, their activations kept or not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vlm_jax.trees import unstack

Remat = Literal["none", "products", "all"]
"""What the backward pass computes a second time (1604.06174).

none: keep every activation. products: keep the products with parameters alone, and compute norms, activation
functions and attention again. all: keep the input of each layer alone, and compute the layer again."""

POLICIES: dict[Remat, Callable[..., bool]] = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes of a stack of pre-norm blocks, and how it is computed."""

    width: int
    depth: int
    heads: int
    mlp: int
    """Hidden units of each feed-forward layer."""
    dropout: float = 0.0
    """Share of each residual branch's output that is dropped in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters are float32."""
    scan: bool = True
    """Compile one block and loop over the layers; False unrolls them."""
    remat: Remat = "none"
    """What to compute again in the backward pass instead of keeping it: nothing, all but products, or each block."""


Config = TypeVar("Config", bound=StackConfig)


def stack(
    block: type[nn.Module],
    config: StackConfig,
    x: Float[Array, "B T D"],
    *settings: Any,
    cache: tuple[Any, ...] | None = None,
    layers: int | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...] | None]:
    """`depth` layers within the module that calls it, and what they leave in the cache.

    Args:
      block: `block(config)(x, *settings) -> (x, None)` is a layer; with a cache, its own part of that comes last, and
        it returns what the layer has made of it.
      settings: the same for all layers: arrays, or bools that the layer branches on.
      cache: one part for each layer; the layers are `unrolled` then.
      layers: the first so many run alone, of those whose parameters there are; None: all.
    """
    assert cache is None or not config.scan
    depth = config.depth if layers is None else layers
    if config.remat != "none":
        static = tuple(i for i, setting in enumerate(settings, start=2) if isinstance(setting, bool))
        # prevent_cse guards rematerialisation against being undone outside a loop; inside one it only costs.
        block = nn.remat(block, policy=POLICIES[config.remat], prevent_cse=not config.scan, static_argnums=static)
    if config.scan:
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=depth,
        )
        if depth < config.depth:
            scanned = nn.map_variables(scanned, "params", lambda tree: jax.tree.map(lambda leaf: leaf[:depth], tree))
        x, _ = scanned(config, name="blocks")(x, *settings)
        return x, None
    if cache is None:
        for i in range(depth):
            x, _ = block(config, name=f"block_{i}")(x, *settings)
        return x, None
    filled = []
    for i, part in enumerate(cache):
        x, part = block(config, name=f"block_{i}")(x, *settings, part)
        # As between scanned layers, so that the inverse of a bfloat16 flow rounds what the flow rounded.
        x = jax.lax.optimization_barrier(x)
        filled.append(part)
    return x, tuple(filled)


def unrolled(config: Config, params: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The same stack for decoding: its layers one after the other, each with parameters and a cache of its own.

    Called before a loop over tokens: a scan over layers within it would copy every layer's parameters for each token.
    """
    return replace(config, scan=False), unstack(params, "blocks", "block")
