"""The U-Net of latent diffusion as diffusers keeps it, `UNet2DConditionModel`: settings and table, in and out.

Settings say heads of a block by `attention_head_dim`, which is not what it is called: diffusers reads it so, too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.nn.unet import LatentUNet
from vlm_jax.pretrained.denoisers import attention_entries, settled, side_of, time_entries
from vlm_jax.pretrained.layout import Entry, linear, norm
from vlm_jax.pretrained.pyramids import attentive, block_types, convolution, heights, levels_of, pointwise
from vlm_jax.pretrained.settings import known
from vlm_jax.pretrained.source import CONFIG, Source
from vlm_jax.pretrained.tensors import computed_in

KIND = "UNet2DConditionModel"
DOWN, UP = "DownBlock2D", "UpBlock2D"
CROSS = "CrossAttn"
"""With what the type of a block with attention begins."""
USUAL: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "down_block_types": [f"{CROSS}{DOWN}"] * 3 + [DOWN],
    "up_block_types": [UP] + [f"{CROSS}{UP}"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "out_channels": 4,
}
"""What a setting is that config.json leaves out (diffusers' class)."""
ONLY: dict[str, Any] = {
    "_class_name": KIND,
    "act_fn": "silu",
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": f"UNetMidBlock2D{CROSS}",
    "norm_eps": 1e-5,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
IDLE = ("use_linear_projection", "upcast_attention", "addition_embed_type_num_heads")
"""The first says how the same matrices are stored, which is seen in them; the second how a softmax is rounded."""


def told_by(source: Source) -> dict[str, Any]:
    """The settings of a directory; raises a `UserError` that names one which cannot be expressed."""
    where = str(source.directory / CONFIG)
    told = known(source.config, USUAL, ONLY, IDLE, where)
    if told["out_channels"] != told["in_channels"]:
        raise UserError(f"in_channels in {where} is {told['in_channels']}: it must be out_channels, those of latents")
    return told


def heads_of(told: Mapping[str, Any], where: str) -> Any:
    """One number for all resolutions."""
    heads = told["attention_head_dim"]
    if isinstance(heads, list) and len(set(heads)) == 1:
        return heads[0]
    if isinstance(heads, list):
        raise UserError(f"attention_head_dim in {where} is {heads}: as many heads at each resolution can be expressed")
    return heads


def unet_config(source: Source) -> tuple[LatentUNet, int, Any]:
    """The network of a directory, the side of its latents, and their channels."""
    told, where = told_by(source), str(source.directory / CONFIG)
    levels, side = levels_of(told, where, (DOWN, UP), CROSS), side_of(told["sample_size"], where)
    heads, dtype = heads_of(told, where), computed_in(source.tensors, "conv_in.weight")
    network = settled(
        lambda: LatentUNet(
            widths=tuple(told["block_out_channels"]),
            blocks=told["layers_per_block"],
            attention=heights(levels, side),
            heads=heads,
            groups=told["norm_num_groups"],
            dtype=dtype,
        ),
        where,
    )
    return network, side, told["in_channels"]


def told_of(config: LatentUNet, side: int, channels: int, text_width: int) -> dict[str, Any]:
    """The inverse: a `config.json`."""
    levels, count = attentive(config, side), len(config.widths)
    return ONLY | {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": block_types(DOWN, CROSS, levels, count),
        "up_block_types": block_types(UP, CROSS, levels, count)[::-1],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "cross_attention_dim": text_width,
        "attention_head_dim": config.heads,
        "use_linear_projection": False,
    }


def unet_entries(config: LatentUNet, side: int) -> Iterator[Entry]:
    """The table."""
    widths, last, levels = config.widths, len(config.widths) - 1, attentive(config, side)
    yield from time_entries("conditioning", "time_embedding.linear_1", "time_embedding.linear_2")
    yield from convolution("first", "conv_in")
    for level, width in enumerate(widths):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        for i in range(config.blocks):
            narrower = not i and widths[max(level - 1, 0)] != width
            yield from block_entries(f"down_{level}_{i}", f"{down}.resnets.{i}", skip=narrower)
            if level in levels:
                yield from transformer_entries(f"down_{level}_{i}_attention", f"{down}.attentions.{i}")
        for i in range(config.blocks + 1):
            # What the way down has left comes beside, so that the width always changes.
            yield from block_entries(f"up_{level}_{i}", f"{up}.resnets.{i}", skip=True)
            if level in levels:
                yield from transformer_entries(f"up_{level}_{i}_attention", f"{up}.attentions.{i}")
        if level:
            yield from convolution(f"down_{level}/conv", f"down_blocks.{level - 1}.downsamplers.0.conv")
            yield from convolution(f"up_{level}/conv", f"{up}.upsamplers.0.conv")
    yield from block_entries("middle_0", "mid_block.resnets.0", skip=False)
    yield from transformer_entries("middle_attention", "mid_block.attentions.0")
    yield from block_entries("middle_1", "mid_block.resnets.1", skip=False)
    yield from norm("norm_out", "conv_norm_out")
    yield from convolution("last", "conv_out")


def block_entries(path: str, key: str, *, skip: bool) -> Iterator[Entry]:
    """A residual block; `skip`: it changes the width."""
    for ours, theirs in (("in", 1), ("out", 2)):
        yield from norm(f"{path}/norm_{ours}", f"{key}.norm{theirs}")
        yield from convolution(f"{path}/conv_{ours}", f"{key}.conv{theirs}")
    yield from linear(f"{path}/condition", f"{key}.time_emb_proj")
    if skip:
        yield from pointwise(f"{path}/skip", f"{key}.conv_shortcut")


def transformer_entries(path: str, key: str) -> Iterator[Entry]:
    """A spatial transformer, whose first and last matrices are stored as convolutions, or as what they are."""
    block = f"{key}.transformer_blocks.0"
    yield from norm(f"{path}/norm", f"{key}.norm")
    yield from pointwise(f"{path}/into", f"{key}.proj_in")
    for i, name in enumerate(("map", "text"), 1):
        yield from norm(f"{path}/{name}_norm", f"{block}.norm{i}")
        yield from attention_entries(f"{path}/to_{name}", f"{block}.attn{i}", bias=False)
    yield from norm(f"{path}/mlp_norm", f"{block}.norm3")
    for i, name in enumerate(("up", "gate")):
        yield from linear(f"{path}/mlp/{name}", f"{block}.ff.net.0.proj", part=(i, 2))
    yield from linear(f"{path}/mlp/down", f"{block}.ff.net.2")
    yield from pointwise(f"{path}/out", f"{key}.proj_out")
