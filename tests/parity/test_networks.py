"""Forward passes of the U-Net and the diffusion transformer are those of `diffusers`, of the same random weights."""

from collections.abc import Mapping

import jax
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from jaxtyping import Array, Float

from vlm_jax.nn.dit import DiT, DiTTower
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import UNet, UNetTower
from vlm_jax.trees import leaves_by_path

CLASSES = 5
RANDOM = np.random.default_rng(0)
X = np.float32(RANDOM.normal(size=(3, 8, 8, 4)))
TIME, LABEL = np.float32([0, 417, 999]), np.int32([0, 4, CLASSES])  # the last label tells no class


@pytest.fixture(autouse=True)
def _random_weights() -> None:
    torch.manual_seed(0)


def perturb(network: torch.nn.Module) -> None:
    """No weight is where it starts: many start at zero, and would hide what follows them."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


class Weights:
    """What `diffusers` calls a layer's weights -> what this library does."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.state = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}

    def norm(self, name: str) -> dict[str, Float[np.ndarray, " C"]]:
        return {"scale": self.state[f"{name}.weight"], "bias": self.state[f"{name}.bias"]}

    def convolution(self, name: str) -> dict[str, np.ndarray]:
        return {"kernel": self.state[f"{name}.weight"].transpose(2, 3, 1, 0), "bias": self.state[f"{name}.bias"]}

    def dense(self, name: str) -> dict[str, np.ndarray]:
        """Also of a 1x1 convolution."""
        kernel = self.state[f"{name}.weight"]
        return {"kernel": kernel.reshape(kernel.shape[:2]).T, "bias": self.state[f"{name}.bias"]}

    def attention(self, name: str) -> dict[str, dict[str, np.ndarray]]:
        layers = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
        return {ours: self.dense(f"{name}.{theirs}") for ours, theirs in layers.items()}


def compare(
    tower: UNetTower | DiTTower, params: Mapping[str, object], theirs: torch.nn.Module, label: np.ndarray
) -> Float[Array, "B H W O"]:
    """Ours, once every one of its parameters has been given and both agree."""
    shapes = jax.eval_shape(tower.init, jax.random.key(0), X, TIME, label)["params"]
    assert {path: leaf.shape for path, leaf in leaves_by_path(shapes).items()} == {
        path: leaf.shape for path, leaf in leaves_by_path(params).items()
    }
    ours = jax.jit(tower.apply)({"params": params}, X, TIME, label)
    with torch.no_grad():
        image = torch.from_numpy(X.transpose(0, 3, 1, 2).copy())
        expected = theirs(image, torch.from_numpy(TIME), class_labels=torch.from_numpy(label)).sample
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert expected.std() > 0.3
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    return ours


@pytest.mark.parametrize("attention", [(), (4,), (4, 2)], ids=["middle", "inside", "coarsest"])
def test_the_unet(attention: tuple[int, ...]):
    """With what google/ddpm-cifar10-32 sets."""
    widths, blocks = (16, 32, 32), 2
    down = ["AttnDownBlock2D" if 8 >> level in attention else "DownBlock2D" for level in range(3)]
    theirs = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=16,
        norm_num_groups=8,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=CLASSES + 1,
    ).eval()
    perturb(theirs)
    weights = Weights(theirs)

    def block(name: str) -> dict[str, dict[str, np.ndarray]]:
        layers = {
            "norm_in": weights.norm(f"{name}.norm1"),
            "conv_in": weights.convolution(f"{name}.conv1"),
            "condition": weights.dense(f"{name}.time_emb_proj"),
            "norm_out": weights.norm(f"{name}.norm2"),
            "conv_out": weights.convolution(f"{name}.conv2"),
        }
        shortcut = f"{name}.conv_shortcut"
        return layers | ({"skip": weights.dense(shortcut)} if f"{shortcut}.weight" in weights.state else {})

    def attend(name: str) -> dict[str, dict[str, np.ndarray]]:
        return weights.attention(name) | {"norm": weights.norm(f"{name}.group_norm")}

    params = {
        "conditioning": {
            "time_in": weights.dense("time_embedding.linear_1"),
            "time_out": weights.dense("time_embedding.linear_2"),
            "label": weights.state["class_embedding.weight"],
        },
        "first": weights.convolution("conv_in"),
        "middle_0": block("mid_block.resnets.0"),
        "middle_attention": attend("mid_block.attentions.0"),
        "middle_1": block("mid_block.resnets.1"),
        "norm_out": weights.norm("conv_norm_out"),
        "last": weights.convolution("conv_out"),
    }
    for level in range(3):
        for way, count, place in (("down", blocks, level), ("up", blocks + 1, 2 - level)):
            for i in range(count):
                params[f"{way}_{level}_{i}"] = block(f"{way}_blocks.{place}.resnets.{i}")
                if 8 >> level in attention:
                    params[f"{way}_{level}_{i}_attention"] = attend(f"{way}_blocks.{place}.attentions.{i}")
        if level:
            params[f"down_{level}"] = {"conv": weights.convolution(f"down_blocks.{level - 1}.downsamplers.0.conv")}
            params[f"up_{level}"] = {"conv": weights.convolution(f"up_blocks.{2 - level}.upsamplers.0.conv")}
    config = UNet(widths=widths, blocks=blocks, attention=attention, groups=8, heads=2)
    compare(UNetTower(config, 3, CLASSES), params, theirs, LABEL)


def test_the_diffusion_transformer():
    """As the paper's code has it, from which `diffusers` departs in the frequencies of the time: set back here."""
    width, depth, heads, patch = 32, 3, 4, 2
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=8,
        patch_size=patch,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    ).eval()
    perturb(theirs)
    embedding = theirs.transformer_blocks[0].norm1.emb
    embedding.time_proj.downscale_freq_shift = 0
    for block in theirs.transformer_blocks:  # one for all, as in the paper; diffusers stores a copy for each
        block.norm1.emb = embedding
    weights = Weights(theirs)
    first = "transformer_blocks.0.norm1.emb"
    time_in = weights.dense(f"{first}.timestep_embedder.linear_1")
    cosines, sines = np.split(time_in["kernel"], 2)
    patches = weights.state["pos_embed.proj.weight"]
    params = {
        "conditioning": {
            "time_in": time_in | {"kernel": np.concatenate([sines, cosines])},
            "time_out": weights.dense(f"{first}.timestep_embedder.linear_2"),
            "label": weights.state[f"{first}.class_embedder.embedding_table.weight"],
        },
        "patch": {
            "kernel": patches.transpose(2, 3, 1, 0).reshape(-1, width),
            "bias": weights.state["pos_embed.proj.bias"],
        },
        "last_modulation": weights.dense("proj_out_1"),
        "last": weights.dense("proj_out_2"),
    }
    for i in range(depth):
        name = f"transformer_blocks.{i}"
        params[f"block_{i}"] = {
            "modulation": weights.dense(f"{name}.norm1.linear"),
            "attention": weights.attention(f"{name}.attn1"),
            "mlp": {"up": weights.dense(f"{name}.ff.net.0.proj"), "down": weights.dense(f"{name}.ff.net.2")},
        }
    transformer = Transformer(width=width, depth=depth, heads=heads, mlp=4 * width, scan=False)
    compare(DiTTower(DiT(patch_size=patch, transformer=transformer), 8, CLASSES), params, theirs, LABEL)
