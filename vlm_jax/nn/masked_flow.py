"""The masked-convolution layers of MaCow (Ma et al. 2019, 1902.04208), with the conventions of `nn/coupling.py`.

A layer transforms every row of an image by functions of the rows above it, for all rows at once; its inverse goes row
by row. Four of them, one from each side, are a unit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.nn.convolution import unroll
from vlm_jax.nn.coupling import ActNorm, Context, Image, LogDet, in_turn, transform

ROWS, COLUMNS = 2, 5
"""The convolution's window: rows, all of them above the one that it describes, and columns."""


class RowFlow(nn.Module):
    """Scales and shifts each row by functions of the two above it: an autoregressive flow whose elements are rows."""

    width: int
    """Hidden channels of the network."""
    channels: int
    dtype: str = "float32"

    def setup(self) -> None:
        padding = ((0, 0), (COLUMNS // 2, COLUMNS // 2))
        self.conv_in = nn.Conv(self.width, (ROWS, COLUMNS), padding=padding, dtype=self.dtype)
        self.conv_hidden = nn.Conv(self.width, (1, 1), dtype=self.dtype)
        # In full precision: an accelerator's default product of fp32 would round what is exponentiated.
        init = nn.initializers.zeros
        self.parameters = nn.Conv(2 * self.channels, (1, 1), kernel_init=init, precision="highest")

    def predict(self, above: Float[Array, "B R W C"]) -> Float[Array, "B r W O"]:
        """The parameters of the rows that stand below each two."""
        x = nn.elu(self.conv_hidden(nn.elu(self.conv_in(above))))
        return self.parameters(x.astype(jnp.float32))

    def __call__(self, x: Image, *, inverse: bool = False) -> tuple[Image, LogDet]:
        batch, _, width, channels = x.shape
        nothing = jnp.zeros((batch, ROWS, width, channels))
        if not inverse:
            above = jnp.concatenate([nothing, x[:, :-1]], axis=1)
            return transform(x, self.predict(above), 0, inverse=False)

        def step(flow: Any, above: Image, y: Float[Array, "B W C"]) -> Any:
            row, log_det = transform(y[:, None], flow.predict(above), 0, inverse=True)
            return jnp.concatenate([above[:, 1:], row], axis=1), (row[:, 0], log_det)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        _, (rows, log_dets) = scan(self, nothing, x.swapaxes(0, 1))
        return rows.swapaxes(0, 1), jnp.sum(log_dets, axis=0)


class MaskedUnit(nn.Module):
    """Four layers, between which a square image makes a quarter turn: from its top, right, bottom and left side."""

    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Image, *, inverse: bool = False) -> tuple[Image, LogDet]:
        def body(layer: nn.Module, carry: tuple[Image, LogDet], _: None) -> tuple[tuple[Image, LogDet], None]:
            x, log_det = carry
            if inverse:
                x, more = layer(jnp.rot90(x, -1, axes=(1, 2)), inverse=True)
            else:
                x, more = layer(x)
                x = jnp.rot90(x, axes=(1, 2))
            return (x, log_det + more), None

        scan = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, length=4, reverse=inverse, unroll=unroll(4)
        )
        layer = RowFlow(self.width, x.shape[-1], self.dtype, name="layer")
        (x, log_det), _ = scan(layer, (x.astype(jnp.float32), jnp.zeros(len(x))), None)
        return x, log_det


class MaskedStep(nn.Module):
    """Of MaCow: actnorm and a unit, then a step of Glow, whose coupling alone sees a context or has mixtures."""

    masked_width: int
    step: Callable[..., nn.Module]
    """Makes Glow's."""
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Image, context: Context | None = None, *, inverse: bool = False, train: bool = False
    ) -> tuple[Image, LogDet]:
        unit = MaskedUnit(self.masked_width, self.dtype, name="unit")
        told = partial(self.step(name="step"), context=context, train=train)
        return in_turn(x, ActNorm(name="norm"), unit, told, inverse=inverse)


MASKED_RULES = ((r"conv_(in|hidden)/bias$", ("filters",)),)
"""Sharding rules of `MaskedStep` beside those of `flow_rules`: the couplings' convolutions have no bias."""
