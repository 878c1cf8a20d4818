"""The gated masked convolutions of PixelCNN, over a whole image or row by row and pixel by pixel with caches.

Each pixel has two features (van den Oord et al. 2016, 1606.05328, figure 2): that of the vertical stack knows the rows
above it and that of the horizontal stack the pixels to its left as well, so that together they see all that comes
before, without a blind spot. A mask is a smaller kernel here: the window ends at the pixel itself, and its inputs are
shifted by one pixel before the first layer (as in PixelCNN++, 1701.05517).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.contract import Rule
from vlm_jax.errors import UserError
from vlm_jax.sharding import constrain, platform

Rows = Float[Array, "B Hk W D"]
"""What a layer's vertical convolution reads: the rows so far, below a margin of zeros."""


class Pixels(NamedTuple):
    """What a layer's horizontal convolution reads in a row: the pixels so far, and what the vertical stack tells."""

    pixels: Float[Array, "B 1 Wk D"]
    link: Float[Array, "B 1 W D2"]


def check_kernel(kernel: int) -> None:
    """Refuses a window without a middle."""
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(f"the kernel of a masked convolution is {kernel} pixels a side: choose an odd number")


def gate(x: Float[Array, "*B D2"]) -> Float[Array, "*B D"]:
    """tanh(a) sigmoid(b) of the two halves."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * nn.sigmoid(b)


def convolve(x: Float[Array, "B H W D"], kernel: Float[Array, "h w D E"]) -> Float[Array, "B R C E"]:
    """A convolution without padding."""
    if platform() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    # On the CPU the gradient of a convolution within a loop over layers takes ten times as long as that of a product.
    height, width, _, features = kernel.shape
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    windows = [x[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, features)


class Convolution(nn.Module):
    """Over windows of `shape`, without padding."""

    width: int
    shape: tuple[int, int]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B R C E"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.shape, x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        return convolve(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


class GatedLayer(nn.Module):
    """One layer of both stacks, each with a residual connection."""

    width: int
    kernel: int
    classes: int | None = None
    dropout: float = 0.0
    dtype: str = "float32"

    def setup(self) -> None:
        margin, double = self.kernel // 2, 2 * self.width
        self.vertical_conv = Convolution(double, (margin + 1, self.kernel), self.dtype)
        self.horizontal_conv = Convolution(double, (1, margin + 1), self.dtype)
        self.link = nn.Dense(double, use_bias=False, dtype=self.dtype)
        self.out = nn.Dense(self.width, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)
        if self.classes is not None:
            self.label = self.param("label", nn.initializers.normal(0.02), (self.classes, 2 * double))

    def vertical(
        self, window: Float[Array, "B Rk W D"], label: Int[Array, " B"] | None, *, train: bool = False
    ) -> tuple[Float[Array, "B R W D"], Float[Array, "B R W D2"]]:
        """Rows below a margin -> the rows of the next layer, and what they tell the horizontal stack."""
        margin = self.kernel // 2
        x = self.vertical_conv(jnp.pad(window, ((0, 0), (0, 0), (margin, margin), (0, 0))))
        if label is not None:
            x = x + jnp.split(self.label[label], 2, axis=-1)[0][:, None, None].astype(x.dtype)
        rows = window[:, margin:] + self.drop(gate(x), deterministic=not train)
        return rows, self.link(x)

    def horizontal(
        self,
        window: Float[Array, "B R Wk D"],
        link: Float[Array, "B R W D2"],
        label: Int[Array, " B"] | None,
        *,
        train: bool = False,
    ) -> Float[Array, "B R W D"]:
        """Pixels right of a margin -> the pixels of the next layer."""
        x = self.horizontal_conv(window) + link
        if label is not None:
            x = x + jnp.split(self.label[label], 2, axis=-1)[1][:, None, None].astype(x.dtype)
        return window[:, :, self.kernel // 2 :] + self.out(self.drop(gate(x), deterministic=not train))

    def __call__(
        self, stacks: tuple[Array, Array], label: Array | None, train: bool
    ) -> tuple[tuple[Array, Array], None]:
        """Both stacks over a whole image."""
        v, h = (constrain(x, "batch", None, None, None) for x in stacks)
        margin = (self.kernel // 2, 0)
        v, link = self.vertical(jnp.pad(v, ((0, 0), margin, (0, 0), (0, 0))), label, train=train)
        h = self.horizontal(jnp.pad(h, ((0, 0), (0, 0), margin, (0, 0))), link, label, train=train)
        return (v, h), None

    def row(
        self, row: Float[Array, "B 1 W D"], cache: Rows, position: Int[Array, ""], label: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B 1 W D"], Rows, Pixels]:
        """The vertical stack at the row `position`; the cache with this row, and one for the pixels of this row."""
        margin = self.kernel // 2
        cache = jax.lax.dynamic_update_slice_in_dim(cache, row, position + margin, axis=1)
        window = jax.lax.dynamic_slice_in_dim(cache, position, margin + 1, axis=1)
        row, link = self.vertical(window, label)
        return row, cache, Pixels(jnp.pad(jnp.zeros_like(row), ((0, 0), (0, 0), (0, margin), (0, 0))), link)

    def pixel(
        self, pixel: Float[Array, "B 1 1 D"], cache: Pixels, position: Int[Array, ""], label: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B 1 1 D"], Pixels]:
        """The horizontal stack at the column `position`, given those left of it in the cache."""
        margin, (pixels, link) = self.kernel // 2, cache
        pixels = jax.lax.dynamic_update_slice_in_dim(pixels, pixel, position + margin, axis=2)
        window = jax.lax.dynamic_slice_in_dim(pixels, position, margin + 1, axis=2)
        told = jax.lax.dynamic_slice_in_dim(link, position, 1, axis=2)
        return self.horizontal(window, told, label), Pixels(pixels, link)


class GatedStack(nn.Module):
    """Layers over embedded pixels; what a pixel gets depends on those before it in raster order alone."""

    width: int
    depth: int
    kernel: int
    classes: int | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    scan: bool = True
    """Compile one layer and loop over them, for whole images. False for decoding, with what `unstack` makes of the
    parameters: a scan over layers within a loop over pixels would copy every layer's parameters for each pixel."""

    def setup(self) -> None:
        settings = (self.width, self.kernel, self.classes, self.dropout, self.dtype)
        if self.scan:
            scanned = nn.scan(
                GatedLayer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            self.layers = scanned(*settings)
        else:
            self.layer = [GatedLayer(*settings) for _ in range(self.depth)]

    def __call__(
        self, x: Float[Array, "B H W D"], label: Int[Array, " B"] | None = None, *, train: bool = False
    ) -> Float[Array, "B H W D"]:
        x = x.astype(self.dtype)
        above = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        left = jnp.pad(x[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
        (_, h), _ = self.layers((above, left), label, train)
        return h

    def empty_rows(self, batch: int, height: int, width: int) -> tuple[Rows, ...]:
        """Room for the rows of each layer of the vertical stack."""
        zeros = jnp.zeros((batch, height + self.kernel // 2, width, self.width), self.dtype)
        return (zeros,) * self.depth

    def row(
        self,
        caches: tuple[Rows, ...],
        above: Float[Array, "B W D"],
        position: Int[Array, ""],
        label: Int[Array, " B"] | None,
    ) -> tuple[tuple[Rows, ...], tuple[Pixels, ...]]:
        """The vertical stack at the row `position`, given the embedded row above it: 0 above the first.

        Returns:
          The caches with this row, and those for the pixels of this row.
        """
        x = above[:, None].astype(self.dtype)
        rows: list[Rows] = []
        pixels: list[Pixels] = []
        for layer, cache in zip(self.layer, caches, strict=True):
            x, below, beside = layer.row(x, cache, position, label)
            rows.append(below)
            pixels.append(beside)
        return tuple(rows), tuple(pixels)

    def pixel(
        self,
        caches: tuple[Pixels, ...],
        left: Float[Array, "B D"],
        position: Int[Array, ""],
        label: Int[Array, " B"] | None,
    ) -> tuple[tuple[Pixels, ...], Float[Array, "B D"]]:
        """The output at the column `position` of the row, given the embedded pixel left of it: 0 left of the first."""
        x = left[:, None, None].astype(self.dtype)
        filled: list[Pixels] = []
        for layer, cache in zip(self.layer, caches, strict=True):
            x, cache = layer.pixel(x, cache, position, label)
            filled.append(cache)
        return tuple(filled), x[:, 0, 0]


def masked_rules(*, classes: bool) -> tuple[Rule, ...]:
    """Sharding rules of a `GatedStack`."""
    return (
        (r"layers/(vertical_conv|horizontal_conv|link|out)/kernel$", (None, "filters")),
        (r"layers/(vertical_conv|horizontal_conv|out)/bias$", (None,)),
        *(((r"layers/label$", (None, None)),) if classes else ()),
    )
