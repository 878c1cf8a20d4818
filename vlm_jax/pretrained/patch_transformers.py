"""What the diffusion transformers of diffusers have in common, DiT's and PixArt's: settings and tables, in and out."""

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.nn.transformer import Transformer
from vlm_jax.pretrained.denoisers import attention_entries
from vlm_jax.pretrained.hf_towers import patch_entry
from vlm_jax.pretrained.layout import Entry, linear
from vlm_jax.pretrained.settings import require
from vlm_jax.pretrained.tensors import Tensors, computed_in

OLDER = "Transformer2DModel"
"""What all of them were before diffusers 0.29."""
PATCHES = "pos_embed.proj"
EPS = 1e-6
USUAL: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
"""What a setting is that config.json leaves out (diffusers' classes)."""
ONLY: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
}
ELSEWHERE: dict[str, Any] = {
    "attention_type": "default",
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
}
"""What the older class has besides, of other networks."""
IDLE = ("norm_num_groups", "upcast_attention", "use_linear_projection")
"""Likewise, and how a softmax is rounded: they change nothing of these."""


def check_class(told: Mapping[str, Any], kind: str, where: str) -> None:
    """Refuses the settings of another class."""
    if told.get("_class_name") not in (kind, OLDER):
        raise UserError(f"_class_name in {where} is {told.get('_class_name')!r}: it must be {kind}, or {OLDER}")


def stack_of(told: Mapping[str, Any], tensors: Tensors) -> Transformer:
    """The stack of blocks; raises a `TypeError` where numbers are none."""
    width = told["num_attention_heads"] * told["attention_head_dim"]
    return Transformer(
        width=width,
        depth=told["num_layers"],
        heads=told["num_attention_heads"],
        mlp=4 * width,
        activation="gelu_tanh",
        norm_eps=EPS,
        dtype=computed_in(tensors, f"{PATCHES}.weight"),
    )


def variance_of(told: Mapping[str, Any], usual: str, where: str) -> str:
    """That of a step: learned where there are channels for it, else as the scheduler tells."""
    found, channels = told["out_channels"], told["in_channels"]
    if found not in (None, channels, 2 * channels):
        raise UserError(f"out_channels in {where} is {found}: it must be in_channels, {channels}, or twice that")
    return "learned" if found == 2 * channels else usual


def told_of(config: Any, whose: str) -> dict[str, Any]:
    """The inverse: what both classes say of a `diffusion.Config` whose backbone is one of such blocks.

    Raises:
      UserError: its stack has sizes that they have not, which are named.
    """
    backbone, channels = config.network.backbone, config.channels
    t = backbone.transformer
    settings = {
        "mlp": (t.mlp, 4 * t.width),
        "activation": (t.activation, "gelu_tanh"),
        "norm_eps": (t.norm_eps, EPS),
    }
    require({f"prior.network.backbone.transformer.{name}": each for name, each in settings.items()}, whose)
    return ONLY | {
        "sample_size": config.image_size,
        "patch_size": backbone.patch_size,
        "in_channels": channels,
        "out_channels": 2 * channels if config.variance == "learned" else channels,
        "num_layers": t.depth,
        "num_attention_heads": t.heads,
        "attention_head_dim": t.width // t.heads,
        "norm_eps": EPS,
    }


def patches_entries(key: str, size: int, channels: int) -> Iterator[Entry]:
    """The first layer, a strided convolution."""
    yield patch_entry("patch/kernel", f"{key}.weight", size, channels)
    yield Entry("patch/bias", f"{key}.bias")


def block_entries(path: str, key: str) -> Iterator[Entry]:
    """Attention to the image and feed-forward layer."""
    yield from attention_entries(f"{path}/attention", f"{key}.attn1", bias=True)
    yield from linear(f"{path}/mlp/up", f"{key}.ff.net.0.proj")
    yield from linear(f"{path}/mlp/down", f"{key}.ff.net.2")
