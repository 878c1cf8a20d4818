"""The layouts of latent diffusion: there and back, which of their arrays is which of ours, and what they refuse."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converted import assert_trees_equal
from published_pipelines import (
    BLOCKS,
    CONFIGS,
    MOMENTS,
    arrays_of,
    backbone_of,
    change,
    publish,
    write_arrays,
)
from vlm_jax.data import Caption, Image, Label
from vlm_jax.errors import UserError
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.layout import abstract_params, held, named, nested, read_params, recognised
from vlm_jax.pretrained.source import open_source
from vlm_jax.trees import leaves_by_path


@pytest.fixture(scope="module", params=CONFIGS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any, Any]:
    """Its name, its directory, our parameters and their arrays."""
    directory = tmp_path_factory.mktemp("published")
    return request.param, directory, *publish(request.param, directory)


def test_settings_arrays_and_moments_go_there_and_back(published: tuple[str, Path, Any, Any]):
    """But for what no file holds: who looks at copies, and what is derived of the text encoder."""
    name, directory, params, _ = published
    source = open_source(directory)
    layout = recognised(source, LAYOUTS, "dit-original" if name == "dit-original" else None)
    assert layout.name == name
    config = layout.config(source)
    assert config == CONFIGS[name]
    assert layout.fields(source) == (Image(), Label() if name.startswith("dit") else Caption())
    expected = {path: x for path, x in leaves_by_path(held(layout, params)).items() if path not in layout.derived}
    assert_trees_equal(read_params(layout, config, source.tensors), nested(expected))
    moments = {f"moments/first/{key}": x for key, x in MOMENTS["moments"]["first"].items()}
    assert_trees_equal(dict(layout.collections(source, config)), {} if name == "dit-original" else moments)
    assert layout.sampling(config).guidance > 1


def test_files_of_the_authors_of_dit_are_read_where_they_are_named(tmp_path: Path):
    """Those of SiT, which predicts another thing, have the same keys."""
    publish("dit-original", tmp_path)
    with pytest.raises(UserError, match=r"is of no layout that is known here .*dit-original"):
        recognised(open_source(tmp_path), LAYOUTS)


def test_times_are_cosines_before_sines_there_and_after_them_here(published: tuple[str, Path, Any, Any]):
    name, _, params, arrays = published
    key = {
        "stable-diffusion": "unet/time_embedding.linear_1.weight",
        "dit": "transformer/transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight",
        "pixart": "transformer/adaln_single.emb.timestep_embedder.linear_1.weight",
        "dit-original": "t_embedder.mlp.0.weight",
    }[name]
    ours = (params if name == "dit-original" else params["prior"])["backbone"]["conditioning"]["time_in"]["kernel"]
    half = len(ours) // 2
    np.testing.assert_array_equal(arrays[key][:, :half], ours[half:].T)
    np.testing.assert_array_equal(arrays[key][:, half:], ours[:half].T)


def test_the_arrays_of_a_u_net_are_where_diffusers_has_them(tmp_path: Path):
    """Values before gates; three levels, the last of which is up_blocks.0."""
    params, arrays = publish("stable-diffusion", tmp_path)
    ours = params["prior"]["backbone"]
    block = ours["up_0_2_attention"]
    theirs = "unet/up_blocks.2.attentions.2"
    assert arrays[f"{theirs}.proj_in.weight"].shape == (8, 8, 1, 1)
    np.testing.assert_array_equal(arrays[f"{theirs}.proj_in.weight"][:, :, 0, 0], block["into"]["kernel"].T)
    layer = f"{theirs}.transformer_blocks.0"
    halves = np.split(arrays[f"{layer}.ff.net.0.proj.weight"], 2)
    np.testing.assert_array_equal(halves[0], block["mlp"]["up"]["kernel"].T)
    np.testing.assert_array_equal(halves[1], block["mlp"]["gate"]["kernel"].T)
    np.testing.assert_array_equal(arrays[f"{layer}.attn2.to_k.weight"], block["to_text"]["key"]["kernel"].T)
    np.testing.assert_array_equal(arrays[f"{layer}.attn1.to_out.0.bias"], block["to_map"]["out"]["bias"])
    np.testing.assert_array_equal(arrays[f"{layer}.norm2.weight"], block["text_norm"]["scale"])
    resnet, down = "unet/down_blocks.2.resnets.0", ours["down_2_0"]
    np.testing.assert_array_equal(arrays[f"{resnet}.time_emb_proj.weight"], down["condition"]["kernel"].T)
    np.testing.assert_array_equal(arrays[f"{resnet}.conv_shortcut.weight"][:, :, 0, 0], down["skip"]["kernel"].T)
    assert "unet/down_blocks.1.resnets.0.conv_shortcut.weight" not in arrays  # of as many channels
    assert "unet/down_blocks.1.attentions.0.norm.weight" not in arrays
    kernel = arrays["unet/up_blocks.0.upsamplers.0.conv.weight"]
    np.testing.assert_array_equal(kernel, ours["up_2"]["conv"]["kernel"].transpose(3, 2, 0, 1))


def test_linear_projections_of_a_u_net_are_the_same_matrices(tmp_path: Path):
    """`use_linear_projection`, by which nothing is computed otherwise."""
    name = "stable-diffusion"
    params, arrays = publish(name, tmp_path)
    flat = {key: x[:, :, 0, 0] if re.search(r"proj_(in|out)\.weight$", key) else x for key, x in arrays.items()}
    assert sum(flat[key].ndim != arrays[key].ndim for key in arrays) == 2 * (2 * 2 + 2 * 3 + 1)
    write_arrays(name, tmp_path, flat)
    change(tmp_path / "unet" / "config.json", use_linear_projection=True)
    source, layout = open_source(tmp_path), named(LAYOUTS, name)
    config = layout.config(source)
    found = read_params(layout, config, source.tensors)["prior"]["backbone"]
    assert_trees_equal(found, params["prior"]["backbone"])


def test_keys_of_other_versions_are_read(tmp_path: Path):
    """Of transformers 5's text tower, diffusers' older attention of a first stage, and what gives the model nothing."""
    name = "stable-diffusion"
    params, arrays = publish(name, tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def other(key: str) -> str:
        if key.startswith("vae/"):
            key = re.sub(r"to_([qkv]|out\.0)(?=\.)", lambda found: older[found[0]], key)
        return key.replace("text_encoder/text_model.", "text_encoder/")

    renamed = {other(key): array for key, array in arrays.items()}
    assert len(renamed.keys() - arrays.keys()) > 30
    renamed["text_encoder/text_projection.weight"] = np.ones((2, 2), np.float32)
    renamed["text_encoder/embeddings.position_ids"] = np.arange(12)[None]
    write_arrays(name, tmp_path, renamed)
    source, layout = open_source(tmp_path), named(LAYOUTS, name)
    found = read_params(layout, layout.config(source), source.tensors)
    assert_trees_equal(found["prior"]["text"], params["prior"]["text"])
    assert_trees_equal(found["first"], held(layout, params)["first"])


def test_of_several_files_of_weights_the_plain_one_is_read(tmp_path: Path):
    params, _ = publish("dit", tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.with_name("diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    source, layout = open_source(tmp_path), named(LAYOUTS, "dit")
    found = read_params(layout, layout.config(source), source.tensors)["prior"]["backbone"]
    assert_trees_equal(found, params["prior"]["backbone"])
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(UserError, match=r"transformer holds 2 files of weights .*: name the one to be read"):
        open_source(tmp_path)


def test_copies_within_a_dit_must_be_copies(tmp_path: Path):
    _, arrays = publish("dit", tmp_path)
    key = "transformer/transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    np.testing.assert_array_equal(arrays[key], arrays[key.replace("blocks.1", "blocks.0")])
    layout, config = named(LAYOUTS, "dit"), CONFIGS["dit"]
    write_arrays("dit", tmp_path, {**arrays, key: arrays[key] + 1})
    with pytest.raises(UserError, match=re.escape(f"{key} in {tmp_path} is another table than it repeats")):
        read_params(layout, config, open_source(tmp_path).tensors)
    write_arrays("dit", tmp_path, {other: array for other, array in arrays.items() if other != key})
    with pytest.raises(UserError, match=re.escape(f"lacks {key}, which dit has")):
        read_params(layout, config, open_source(tmp_path).tensors)


def test_positions_of_a_dit_must_be_those_that_it_computes(tmp_path: Path):
    """In half precision, too."""
    name = "dit-original"
    _, arrays = publish(name, tmp_path)
    table = arrays["pos_embed"]
    assert table.shape == (1, 16, 384)
    angles = np.arange(4)[:, None] * 10_000.0 ** -(np.arange(96) / 96)  # 2212.09748's release, get_2d_sincos_pos_embed
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    expected = [np.concatenate([waves[column], waves[row]]) for row in range(4) for column in range(4)]
    np.testing.assert_allclose(table[0], expected, atol=1e-6)
    layout, config = named(LAYOUTS, name), CONFIGS[name]
    write_arrays(name, tmp_path, {**arrays, "pos_embed": table.astype(np.float16)})
    read_params(layout, config, open_source(tmp_path).tensors)
    for wrong in (table[:, ::-1], table[:, :, :-2]):
        write_arrays(name, tmp_path, {**arrays, "pos_embed": np.ascontiguousarray(wrong)})
        with pytest.raises(UserError, match=r"pos_embed in .* is not what the model computes in its place"):
            read_params(layout, config, open_source(tmp_path).tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_too_few_or_too_many_is_refused(name: str, tmp_path: Path):
    _, arrays = publish(name, tmp_path)
    layout, key = named(LAYOUTS, name), next(key for key in arrays if key.endswith(".bias"))
    config = layout.config(open_source(tmp_path))
    for changed, words in (
        ({other: array for other, array in arrays.items() if other != key}, f"lacks {key}, which {name} has"),
        ({**arrays, f"{key}.scale": arrays[key]}, f"holds {key}.scale, which {name} of these"),
    ):
        write_arrays(name, tmp_path, changed)
        with pytest.raises(UserError, match=re.escape(words)) as refusal:
            read_params(layout, config, open_source(tmp_path).tensors)
        assert "\n" not in str(refusal.value)


def test_unrolled_layers_are_written_as_scanned_ones(tmp_path: Path):
    _, arrays = publish("dit", tmp_path)
    config = backbone_of(CONFIGS["dit"], transformer=replace(BLOCKS, scan=False))
    source, layout = open_source(tmp_path), named(LAYOUTS, "dit")
    params = leaves_by_path(read_params(layout, config, source.tensors))
    drawn = {path: np.zeros(x.shape, np.float32) for path, x in leaves_by_path(abstract_params(config)).items()}
    assert "prior/backbone/block_1/mlp/up/kernel" in params
    assert_trees_equal(arrays_of("dit", config, nested(drawn | params)), arrays)
