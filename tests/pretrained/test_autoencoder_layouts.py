"""The layouts of first stages: there and back, each beside the others of the same weights, and what they refuse."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from converted import assert_trees_equal
from reference import random_params
from vlm_jax.data import Data, Image
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder, vqvae
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.quantize import EMA, Learned
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.layout import abstract_params, held, named, read_params, recognised, written, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

NETWORK = Pyramid(widths=(32, 64, 32), blocks=1, attention=(8, 16))
KL = autoencoder.Config(image_size=32, network=NETWORK, latent=3, objective=Adversarial())
CODES = Learned(size=7, width=4)
VQ = vqvae.Config(image_size=32, network=replace(NETWORK, blocks=2), hidden=5, quantizer=CODES, objective=Adversarial())
CONFIGS: dict[str, Any] = {
    "autoencoder_kl": replace(KL, network=replace(NETWORK, groups=16), channels=1),
    "autoencoder_kl-compvis": KL,
    "vq_model": replace(VQ, network=replace(NETWORK, groups=8)),
    "vqgan": VQ,
    "vqgan-llamagen": replace(VQ, quantizer=replace(CODES, unit=True)),
}
MOMENTS = {"moments": {"mean": np.float32([0.0609] * 3), "square": np.float32([0.0609**2 + 1.5305**-2] * 3)}}
"""Stable Diffusion 3's."""


def arrays_of(name: str, config: Any, params: Any) -> dict[str, np.ndarray]:
    layout = named(LAYOUTS, name)
    return dict(written(layout, config, params, written_keys(layout, config, params)))


def exported(name: str, config: Any, collections: Any = MOMENTS) -> dict[str, dict[str, Any]]:
    layout, training = named(LAYOUTS, name), Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1)
    assert layout.export is not None
    experiment = Experiment(model=config, data=Data(name=None, fields=(Image(),)), training=training)
    files, told = dict(layout.export(experiment, None)), layout.told(collections)
    return {file: {**content, **told.get(file, {})} for file, content in files.items()}


def published(name: str, directory: Path, config: Any = None) -> tuple[Any, dict[str, np.ndarray]]:
    """Random parameters in a directory, and the arrays that they were written as."""
    config = CONFIGS[name] if config is None else config
    params = random_params(abstract_params(config))
    arrays = arrays_of(name, config, params)
    directory.mkdir(exist_ok=True)
    for file, content in exported(name, config).items():
        (directory / file).write_text(json.dumps(content))
    save_file(arrays, directory / named(LAYOUTS, name).weights[""])
    return params, arrays


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_arrays_and_moments_go_there_and_back(name: str, tmp_path: Path):
    params, _ = published(name, tmp_path)
    source = open_source(tmp_path)
    layout = recognised(source, LAYOUTS)
    assert layout.name == name
    config = layout.config(source)
    assert config == CONFIGS[name] and layout.fields(source) == (Image(),)
    found = read_params(layout, config, source.tensors)
    assert "objective" in params and "objective" not in found
    assert_trees_equal(found, held(layout, params))
    kept = layout.collections(source, config)
    assert_trees_equal(dict(kept), {f"moments/{key}": x for key, x in MOMENTS["moments"].items()} if kept else {})
    assert bool(kept) == name.startswith("autoencoder")


RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "diffusers": (
        (r"^encoder\.down\.(\d)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"^encoder\.down\.(\d)\.attn\.", r"encoder.down_blocks.\1.attentions."),
        (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        (r"^decoder\.up\.(\d)\.block\.", r"decoder.up_blocks.TURN\1.resnets."),
        (r"^decoder\.up\.(\d)\.attn\.", r"decoder.up_blocks.TURN\1.attentions."),
        (r"^decoder\.up\.(\d)\.upsample\.", r"decoder.up_blocks.TURN\1.upsamplers.0."),
        (r"mid\.block_1\.", "mid_block.resnets.0."),
        (r"mid\.block_2\.", "mid_block.resnets.1."),
        (r"mid\.attn_1\.", "mid_block.attentions.0."),
        (r"norm_out\.", "conv_norm_out."),
        (r"nin_shortcut", "conv_shortcut"),
        (r"(attentions\.\d)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d)\.([qkv])\.", r"\1.to_\2."),
        (r"\.proj_out\.", ".to_out.0."),
    ),
    "llamagen": (
        (r"^encoder\.down\.(\d)\.block\.", r"encoder.conv_blocks.\1.res."),
        (r"^encoder\.down\.", "encoder.conv_blocks."),
        (r"^decoder\.up\.(\d)\.block\.", r"decoder.conv_blocks.TURN\1.res."),
        (r"^decoder\.up\.(\d)\.", r"decoder.conv_blocks.TURN\1."),
        (r"mid\.block_1\.", "mid.0."),
        (r"mid\.attn_1\.", "mid.1."),
        (r"mid\.block_2\.", "mid.2."),
    ),
}
"""CompVis's keys -> those of another release. TURN: levels are counted from the other end."""


def renamed(key: str, release: str) -> str:
    for pattern, other in RENAMED[release]:
        key = re.sub(pattern, other, key)
    return re.sub(r"TURN(\d)", lambda found: str(len(NETWORK.widths) - 1 - int(found[1])), key)


@pytest.mark.parametrize(
    ("name", "release", "first"),
    [
        ("autoencoder_kl", "diffusers", "autoencoder_kl-compvis"),
        ("vq_model", "diffusers", "vqgan"),
        ("vqgan-llamagen", "llamagen", "vqgan"),
    ],
)
def test_names_hold_what_compvis_s_do(name: str, release: str, first: str):
    """As the releases' modules are named; of attention diffusers has matrices, where the others have convolutions."""
    config = KL if name.startswith("autoencoder") else VQ
    params = random_params(abstract_params(config))
    arrays, theirs = arrays_of(name, config, params), arrays_of(first, config, params)
    expected = {renamed(key, release): array for key, array in theirs.items()}
    assert arrays.keys() == expected.keys() and len(arrays) == len(theirs)
    for key, array in arrays.items():
        matrix = release == "diffusers" and re.search(r"attentions\.\d\.to_.*weight", key)
        assert not matrix or array.ndim == 2
        np.testing.assert_array_equal(array, expected[key][:, :, 0, 0] if matrix else expected[key], err_msg=key)


def test_convolutions_lie_as_pytorch_s(tmp_path: Path):
    """[out, in, height, width], where ours lie as [height, width, in, out], and 1x1 ones are matrices [in, out]."""
    params, arrays = published("autoencoder_kl-compvis", tmp_path)
    kernel = params["encoder"]["level_1"]["block_0"]["conv_in"]["kernel"]
    assert arrays["encoder.down.1.block.0.conv1.weight"].shape == (64, 32, 3, 3)
    assert arrays["encoder.down.1.block.0.conv1.weight"][5, 4, 2, 1] == kernel[2, 1, 4, 5]
    assert arrays["quant_conv.weight"].shape == (6, 6, 1, 1)
    assert arrays["quant_conv.weight"][2, 4, 0, 0] == params["posterior"]["kernel"][4, 2]
    assert arrays["post_quant_conv.bias"][1] == params["latent"]["bias"][1]


def test_older_files_of_diffusers_call_attention_otherwise(tmp_path: Path):
    params, arrays = published("autoencoder_kl", tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {re.sub(r"to_([qkv]|out\.0)(?=\.)", lambda found: older[found[0]], key): a for key, a in arrays.items()}
    assert old.keys() != arrays.keys()
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    source = open_source(tmp_path)
    layout = recognised(source, LAYOUTS)
    assert_trees_equal(read_params(layout, layout.config(source), source.tensors), held(layout, params))
    both = {**old, "decoder.mid_block.attentions.0.to_q.bias": arrays["decoder.mid_block.attentions.0.to_q.bias"]}
    save_file(both, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"holds decoder\.mid_block\.attentions\.0\.to_q\.bias twice, once by another"):
        read_params(layout, layout.config(source), open_source(tmp_path).tensors)


@pytest.mark.parametrize("name", ["autoencoder_kl-compvis", "vqgan"])
def test_a_whole_model_s_file_holds_its_first_stage_under_a_prefix(name: str, tmp_path: Path):
    """Without settings: what is measured there is the factor of the latents."""
    params, arrays = published(name, tmp_path)
    whole = {f"first_stage_model.{key}": array for key, array in arrays.items()}
    whole |= dict.fromkeys(
        ("model.diffusion_model.out.2.weight", "cond_stage_model.x", "betas", "sqrt_alphas_cumprod", "model_ema.decay"),
        np.ones(2, np.float32),
    )
    (tmp_path / "config.json").unlink()
    config, layout = replace(CONFIGS[name], image_size=256), named(LAYOUTS, name)
    config = replace(config, network=replace(config.network, attention=(64, 128)))
    for factor in (1.0, 0.25):
        measured = {} if factor == 1 else {"scale_factor": np.asarray(factor, np.float32)}
        save_file(whole | measured, tmp_path / "model.safetensors")
        source = open_source(tmp_path)
        assert recognised(source, LAYOUTS) is layout and layout.config(source) == config
        assert_trees_equal(read_params(layout, config, source.tensors), held(layout, params))
        if name != "vqgan":
            np.testing.assert_array_equal(layout.collections(source, config)["moments/square"], [factor**-2] * 3)
    save_file({**whole, "head.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds head\.weight, which .* has not"):
        read_params(layout, config, open_source(tmp_path).tensors)


def change(path: Path, **told: Any) -> None:
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | told))


@pytest.mark.parametrize(
    ("name", "told", "words"),
    [
        ("autoencoder_kl", {"_class_name": "AutoencoderTiny"}, "_class_name in .* is 'AutoencoderTiny'"),
        ("autoencoder_kl", {"act_fn": "gelu"}, "act_fn in .* is 'gelu', which the model cannot express: 'silu' is"),
        ("autoencoder_kl", {"use_quant_conv": False}, "use_quant_conv in .* is False"),
        ("autoencoder_kl", {"use_post_quant_conv": False}, "use_post_quant_conv in .* is False"),
        ("autoencoder_kl", {"mid_block_add_attention": False}, "mid_block_add_attention in .* is False"),
        ("autoencoder_kl", {"norm_num_groups": 24}, r"config\.json does not hold .* multiples of its groups \(24\)"),
        ("autoencoder_kl", {"layers_per_block": "2"}, r"does not hold .*network\.blocks is '2': it must be int"),
        ("autoencoder_kl", {"out_channels": 4}, "out_channels in .* is 4: it must be in_channels"),
        ("autoencoder_kl", {"sample_size": [32, 64]}, r"sample_size in .* is \[32, 64\]: it must be a number"),
        ("autoencoder_kl", {"down_block_types": ["DownBlock2D"] * 3}, "down_block_types in .* has 'DownBlock2D'"),
        ("autoencoder_kl", {"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types in .* must mirror"),
        ("vq_model", {"norm_type": "spatial"}, "norm_type in .* is 'spatial'"),
        ("vq_model", {"num_vq_embeddings": "7"}, r"does not hold .*quantizer\.size is '7'"),
        ("autoencoder_kl-compvis", {"sample_size": "big"}, "sample_size in .* is 'big'"),
    ],
)
def test_a_setting_that_cannot_be_expressed_is_refused_by_its_name(
    name: str, told: dict[str, Any], words: str, tmp_path: Path
):
    published(name, tmp_path)
    change(tmp_path, **told)
    with pytest.raises(UserError, match=words) as refusal:
        named(LAYOUTS, name).config(open_source(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "told", "words"),
    [
        ("autoencoder_kl", {"norm_num_groups": 16, "layers_per_block": 2}, "lacks decoder.up_blocks.0.attentions.2"),
        ("autoencoder_kl", {"latent_channels": 2}, "the settings are those of other weights"),
        ("autoencoder_kl", {"down_block_types": ["DownEncoderBlock2D"] * 3}, "holds .*attentions.* which"),
        ("vq_model", {"num_vq_embeddings": 8}, r"quantize\.embedding\.weight .* is \[7, 4\] .* model has \[8, 4\]"),
    ],
)
def test_settings_of_other_weights_are_refused(name: str, told: dict[str, Any], words: str, tmp_path: Path):
    published(name, tmp_path)
    if "down_block_types" in told:
        told = {**told, "up_block_types": ["UpDecoderBlock2D"] * 3}
    change(tmp_path, **told)
    source, layout = open_source(tmp_path), named(LAYOUTS, name)
    with pytest.raises(UserError, match=words):
        read_params(layout, layout.config(source), source.tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_too_few_or_too_many_is_refused(name: str, tmp_path: Path):
    _, arrays = published(name, tmp_path)
    layout, file = named(LAYOUTS, name), tmp_path / named(LAYOUTS, name).weights[""]
    config = layout.config(open_source(tmp_path))
    key = "decoder.conv_out.bias"
    for changed, words in (
        ({other: array for other, array in arrays.items() if other != key}, f"lacks {key}, which {name} has"),
        ({**arrays, "decoder.conv_out.scale": arrays[key]}, f"holds decoder.conv_out.scale, which {name} of these"),
    ):
        save_file(changed, file)
        with pytest.raises(UserError, match=re.escape(words)) as refusal:
            read_params(layout, config, open_source(tmp_path).tensors)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "change_of", "words"),
    [
        ("autoencoder_kl", lambda c: replace(c, levels=17), "levels is 17 and AutoencoderKL's layouts have 256 alone"),
        ("autoencoder_kl-compvis", lambda c: replace(c, network=replace(NETWORK, groups=8)), "network.groups is 8"),
        ("vq_model", lambda c: replace(c, quantizer=replace(CODES, unit=True)), "quantizer.unit is True"),
        ("vqgan", lambda c: replace(c, quantizer=EMA(size=7, width=4)), "quantizer is 'EMA' and vqgan's"),
        ("vqgan-llamagen", lambda c: VQ, "quantizer.unit is False"),
    ],
)
def test_what_a_layout_cannot_express_is_not_written(name: str, change_of: Callable[[Any], Any], words: str):
    with pytest.raises(UserError, match=words):
        exported(name, change_of(CONFIGS[name]))
