"""The encoder and decoder of VQGAN and latent diffusion by the key names of each release: tables, and their sizes."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.unet import LatentUNet
from vlm_jax.pretrained.layout import Entry, linear, norm
from vlm_jax.pretrained.tensors import Tensors, computed_in

CONV_IN = "encoder.conv_in.weight"
"""The first layer, which all releases call so."""


def kernel_entry(path: str, key: str) -> Entry:
    """A convolution's kernel, which PyTorch keeps as [out, in, height, width] and flax as [height, width, in, out]."""
    read, write = (lambda kernel: kernel.transpose(2, 3, 1, 0)), (lambda kernel: kernel.transpose(3, 2, 0, 1))
    return Entry(f"{path}/kernel", f"{key}.weight", read, write)


def convolution(path: str, key: str) -> list[Entry]:
    """A convolution and its bias."""
    return [kernel_entry(path, key), Entry(f"{path}/bias", f"{key}.bias")]


def pointwise(path: str, key: str) -> list[Entry]:
    """A convolution of 1x1 windows, [out, in, 1, 1], which is a dense layer."""

    def read(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(kernel.shape[:2]).T

    return [
        Entry(f"{path}/kernel", f"{key}.weight", read, lambda kernel: kernel.T[:, :, None, None]),
        Entry(f"{path}/bias", f"{key}.bias"),
    ]


class Names(NamedTuple):
    """Of a release's keys. A level is one resolution."""

    down: str
    """A level of the encoder, 0 the finest."""
    up: str
    """One of the decoder."""
    turned: bool
    """In the decoder 0 is the coarsest."""
    block: str
    attention: str
    """Parts of a level."""
    smaller: str
    larger: str
    """What halves or doubles the height and width after a level."""
    middle: tuple[str, str, str]
    """Block, attention, block."""
    norm_out: str
    skip: str
    attends: tuple[str, str, str, str, str]
    """Norm, query, key, value, out."""
    project: Callable[[str, str], list[Entry]]
    """What the last four are."""

    def level(self, part: str, level: int, levels: int) -> str:
        """What the keys of a level of the encoder or decoder begin with."""
        if part == "encoder":
            return self.down.format(level)
        return self.up.format(levels - 1 - level if self.turned else level)


DIFFUSERS = Names(
    down="encoder.down_blocks.{}",
    up="decoder.up_blocks.{}",
    turned=True,
    block="resnets.{}",
    attention="attentions.{}",
    smaller="downsamplers.0.conv",
    larger="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    skip="conv_shortcut",
    attends=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    project=linear,
)
COMPVIS = Names(
    down="encoder.down.{}",
    up="decoder.up.{}",
    turned=False,
    block="block.{}",
    attention="attn.{}",
    smaller="downsample.conv",
    larger="upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm_out="norm_out",
    skip="nin_shortcut",
    attends=("norm", "q", "k", "v", "proj_out"),
    project=pointwise,
)
LLAMAGEN = COMPVIS._replace(
    down="encoder.conv_blocks.{}",
    up="decoder.conv_blocks.{}",
    turned=True,
    block="res.{}",
    middle=("mid.0", "mid.1", "mid.2"),
)


def attentive(network: Pyramid | LatentUNet, image_size: int) -> set[int]:
    """The levels that have attention after each block."""
    return {level for level in range(len(network.widths)) if image_size // 2**level in network.attention}


def heights(levels: Set[int], image_size: int) -> tuple[int, ...]:
    """The inverse: their heights, the least first."""
    return tuple(sorted(image_size // 2**level for level in levels))


def levels_of(told: Mapping[str, Any], where: str, plain: tuple[str, str], mark: str) -> set[int]:
    """The levels with attention by the types of their blocks on the way down, which those of the way up must mirror.

    Args:
      plain: types of either way without attention.
      mark: with what those with attention begin.

    Raises:
      UserError: they do not, or there are others, or not as many as widths.
    """
    found = []
    for name, kind in zip(("down_block_types", "up_block_types"), plain, strict=True):
        blocks = told[name] if isinstance(told[name], list) else [told[name]]
        if other := [block for block in blocks if block not in (kind, mark + kind)]:
            raise UserError(f"{name} in {where} has {other[0]!r}: {kind} and {mark}{kind} can be expressed")
        found.append([block != kind for block in blocks])
    down, up = found
    if down != up[::-1]:
        raise UserError(f"up_block_types in {where} is {told['up_block_types']}, which must mirror down_block_types")
    if isinstance(widths := told["block_out_channels"], list) and len(widths) != len(down):
        raise UserError(f"block_out_channels in {where} is {widths}, and there are {len(down)} down_block_types")
    return {level for level, attends in enumerate(down) if attends}


def block_types(plain: str, mark: str, levels: Set[int], count: int) -> list[str]:
    """The inverse: the types of the blocks of one way, the finest first."""
    return [mark + plain if level in levels else plain for level in range(count)]


def block_entries(names: Names, path: str, key: str, *, skip: bool) -> Iterator[Entry]:
    """A residual block; `skip`: it changes the width."""
    for ours, theirs in (("in", 1), ("out", 2)):
        yield from norm(f"{path}/norm_{ours}", f"{key}.norm{theirs}")
        yield from convolution(f"{path}/conv_{ours}", f"{key}.conv{theirs}")
    if skip:
        yield from pointwise(f"{path}/skip", f"{key}.{names.skip}")


def attention_entries(names: Names, path: str, key: str) -> Iterator[Entry]:
    first, *projections = names.attends
    yield from norm(f"{path}/norm", f"{key}.{first}")
    for ours, theirs in zip(("query", "key", "value", "out"), projections, strict=True):
        yield from names.project(f"{path}/{ours}", f"{key}.{theirs}")


def half_entries(network: Pyramid, image_size: int, names: Names, part: str) -> Iterator[Entry]:
    """The table of the encoder or the decoder."""
    widths, levels, last = network.widths, attentive(network, image_size), len(network.widths) - 1
    encodes = part == "encoder"
    yield from convolution(f"{part}/first", f"{part}.conv_in")
    for level, width in enumerate(widths):
        key = names.level(part, level, len(widths))
        before = widths[max(level - 1, 0) if encodes else min(level + 1, last)]
        for i in range(network.blocks if encodes else network.blocks + 1):
            path, inputs = f"{part}/level_{level}", width if i else before
            yield from block_entries(names, f"{path}/block_{i}", f"{key}.{names.block.format(i)}", skip=inputs != width)
            if level in levels:
                yield from attention_entries(names, f"{path}/attention_{i}", f"{key}.{names.attention.format(i)}")
        if encodes and level < last:
            yield from convolution(f"{part}/down_{level + 1}/conv", f"{key}.{names.smaller}")
        if not encodes and level:
            yield from convolution(f"{part}/up_{level}/conv", f"{key}.{names.larger}")
    first, attends, second = (f"{part}.{name}" for name in names.middle)
    yield from block_entries(names, f"{part}/middle/block_0", first, skip=False)
    yield from attention_entries(names, f"{part}/middle/attention_0", attends)
    yield from block_entries(names, f"{part}/middle/block_1", second, skip=False)
    yield from norm(f"{part}/norm_out", f"{part}.{names.norm_out}")
    yield from convolution(f"{part}/last", f"{part}.conv_out")


def pyramid_entries(network: Pyramid, image_size: int, names: Names) -> Iterator[Entry]:
    """The table of both, which lie at `encoder` and `decoder` among our parameters."""
    for part in ("encoder", "decoder"):
        yield from half_entries(network, image_size, names, part)


def pyramid_of(tensors: Tensors, image_size: int, names: Names, groups: int) -> Pyramid:
    """The sizes of the arrays, where nothing else tells them."""
    block, attention = f"{names.block}.conv1.weight", f"{names.attention.format(0)}.{names.attends[1]}.weight"
    levels = range(counted(tensors, f"{names.down}.{block.format(0)}"))
    attends = {level for level in levels if f"{names.down.format(level)}.{attention}" in tensors}
    return Pyramid(
        widths=tuple(tensors.shape(f"{names.down.format(level)}.{block.format(0)}")[0] for level in levels),
        blocks=counted(tensors, f"{names.down.format(0)}.{block}"),
        attention=heights(attends, image_size),
        groups=groups,
        dtype=computed_in(tensors, CONV_IN),
    )


def counted(tensors: Tensors, key: str) -> int:
    """How many keys there are, numbered from 0 on."""
    return next(number for number in itertools.count() if key.format(number) not in tensors)
