"""Llama's layouts: every array in its place, both ways, and what the decoder cannot express is refused by its name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converted import CONFIG, KINDS, TOKENIZER, assert_trees_equal, random_weights, write_gguf, write_llama
from vlm_jax.errors import UserError
from vlm_jax.nn.decoder import PostNormDecoderConfig
from vlm_jax.pretrained import LAYOUTS, llama, llama_gguf
from vlm_jax.pretrained.layout import Layout, read_params, recognised, written, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.trees import leaves_by_path

GGUF = replace(CONFIG, decoder=replace(CONFIG.decoder, width=32, head_width=8, mlp=64))


def read(path: Path) -> tuple[Layout, object, dict]:
    source = open_source(path)
    layout = recognised(source, LAYOUTS)
    config = layout.config(source)
    return layout, config, read_params(layout, config, source.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_and_arrays_are_those_of_the_directory_and_go_back(kind: str, tmp_path: Path):
    config, weights = KINDS[kind], random_weights(KINDS[kind])
    layout, found, params = read(write_llama(tmp_path, config, weights))
    assert (layout, found) == (llama.LAYOUT, config)
    back = dict(written(layout, config, params, sizes := written_keys(layout, config, params)))
    assert_trees_equal(back, weights)
    assert sizes == {key: array.nbytes for key, array in weights.items()}


@pytest.mark.parametrize("scan", [True, False])
def test_layers_are_stacked_for_a_scan_and_apart_without(scan: bool, tmp_path: Path):
    config, weights = CONFIG, random_weights(CONFIG)
    source = open_source(write_llama(tmp_path, config, weights))
    config = replace(config, decoder=replace(config.decoder, scan=scan))
    params = leaves_by_path(read_params(llama.LAYOUT, config, source.tensors))
    path = "decoder/blocks/mlp/gate/kernel" if scan else "decoder/block_1/mlp/gate/kernel"
    gate = params[path][1] if scan else params[path]
    np.testing.assert_array_equal(gate, weights["model.layers.1.mlp.gate_proj.weight"].T)


@pytest.mark.parametrize("version", [4, 5])
def test_the_rotary_positions_of_both_versions_of_transformers_are_read(version: int, tmp_path: Path):
    config = KINDS["untied"]
    path = write_llama(tmp_path, config, random_weights(config))
    told = json.loads((path / "config.json").read_text())
    if version == 4:
        rope = told.pop("rope_parameters")
        told |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (path / "config.json").write_text(json.dumps(told))
    assert read(path)[1] == config


def test_what_config_json_leaves_out_is_what_transformers_makes_of_it(tmp_path: Path):
    weights = random_weights(CONFIG)
    path = write_llama(tmp_path, CONFIG, weights)
    told = json.loads((path / "config.json").read_text())
    for name in ("rope_parameters", "head_dim", "rms_norm_eps", "num_key_value_heads"):
        del told[name]
    (path / "config.json").write_text(json.dumps(told))
    config = llama.LAYOUT.config(open_source(path))
    plain = replace(CONFIG.decoder, rope_base=10_000.0, norm_eps=1e-6, kv_heads=4)
    assert config == replace(CONFIG, decoder=plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"bits": 4}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("hidden_size", "large"),
        ("rms_norm_eps", None),
    ],
)
def test_a_setting_that_the_decoder_cannot_express_is_refused_by_its_name(name: str, value: object, tmp_path: Path):
    path = write_llama(tmp_path, CONFIG, random_weights(CONFIG), **{name: value})
    where = re.escape(str(path / "config.json"))
    words = "rotary positions" if name.startswith("rope") else name if value not in ("large", None) else "settings"
    with pytest.raises(UserError, match=f"{words}.*{where}|{where}.*{words}"):
        read(path)


def test_an_array_too_many_too_few_or_of_another_shape_is_refused_by_its_name(tmp_path: Path):
    weights, key = random_weights(CONFIG), "model.layers.1.mlp.up_proj.weight"
    extra = weights | {"model.layers.1.mlp.up_proj.bias": np.zeros(40, np.float32)}
    with pytest.raises(UserError, match=r"holds model\.layers\.1\.mlp\.up_proj\.bias, which llama of these settings"):
        read(write_llama(tmp_path / "extra", CONFIG, extra))
    few = {name: array for name, array in weights.items() if name != key}
    with pytest.raises(UserError, match=rf"lacks {re.escape(key)}"):
        read(write_llama(tmp_path / "few", CONFIG, few))
    with pytest.raises(
        UserError, match=rf"{re.escape(key)} .*is \[41, 24\] and would be \[24, 41\] where .* \[24, 40\]"
    ):
        read(write_llama(tmp_path / "shape", CONFIG, weights | {key: np.zeros((41, 24), np.float32)}))
    with pytest.raises(UserError, match=rf"{re.escape(key)} .*is \[960\]"):
        read(write_llama(tmp_path / "flat", CONFIG, weights | {key: weights[key].ravel()}))


def test_a_tied_table_may_be_there_twice_and_must_be_the_same(tmp_path: Path):
    weights = random_weights(CONFIG)
    table = weights["model.embed_tokens.weight"]
    plain = read(write_llama(tmp_path / "once", CONFIG, weights))
    twice = read(write_llama(tmp_path / "twice", CONFIG, weights | {"lm_head.weight": table.copy()}))
    assert_trees_equal(plain[2], twice[2])
    with pytest.raises(UserError, match=r"lm_head\.weight in .* is another table than it repeats"):
        read(write_llama(tmp_path / "other", CONFIG, weights | {"lm_head.weight": table + 1}))


def test_what_older_files_hold_beside_weights_is_passed_over(tmp_path: Path):
    weights = random_weights(CONFIG)
    beside = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    plain = read(write_llama(tmp_path / "plain", CONFIG, weights))
    assert_trees_equal(plain[2], read(write_llama(tmp_path / "older", CONFIG, weights | beside))[2])


def test_bfloat16_stays_and_another_type_becomes_float32(tmp_path: Path):
    weights = random_weights(CONFIG)
    kinds = {"bfloat16": jnp.bfloat16, "float16": np.float16, "float32": np.float64}
    for name, kind in kinds.items():
        cast = {key: array.astype(kind) for key, array in weights.items()}
        _, config, params = read(write_llama(tmp_path / name, CONFIG, cast))
        kept = "bfloat16" if name == "bfloat16" else "float32"
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {kept}
        assert config.decoder.dtype == kept
        table = params["token"]["embedding"]
        np.testing.assert_array_equal(table, cast["model.embed_tokens.weight"].astype(kept))


def test_the_token_that_ends_a_text_must_be_one_that_the_settings_name(tmp_path: Path):
    weights = random_weights(CONFIG)
    path = write_llama(tmp_path, CONFIG, weights, eos_token_id=7)
    with pytest.raises(UserError, match=r"ends a text with the id 2 and eos_token_id is 7: bring the tokenizer"):
        read(path)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert read(path)[1].eos_id == 2
    (path / "tokenizer.json").unlink()
    assert read(path)[1].eos_id == 7


def test_a_decoder_of_norms_of_branches_is_not_written_as_one_of_llama():
    config = replace(CONFIG, decoder=PostNormDecoderConfig(**vars(CONFIG.decoder)))
    with pytest.raises(UserError, match="decoder is 'PostNormDecoderConfig' and Llama's layouts have 'DecoderConfig'"):
        llama.told_of(config, TOKENIZER)


def test_files_of_no_layout_are_refused(tmp_path: Path):
    path = write_llama(tmp_path, CONFIG, random_weights(CONFIG), model_type="mamba")
    with pytest.raises(UserError, match=r"is of no layout that is known here .* there are llama, llama-gguf"):
        read(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        read(path)


def test_llama_cpp_turns_neighbours_and_we_turn_halves():
    rows = np.arange(2 * 6)[:, None]
    expected = [[0], [2], [4], [1], [3], [5], [6], [8], [10], [7], [9], [11]]
    np.testing.assert_array_equal(llama_gguf.unpermuted(rows, 2), expected)
    np.testing.assert_array_equal(llama_gguf.permuted(llama_gguf.unpermuted(rows, 2), 2), rows)


@pytest.mark.parametrize("kind", ["llama", "untied", "qwen2", "qwen3"])
def test_a_gguf_gives_what_the_directory_of_the_same_weights_gives(kind: str, tmp_path: Path):
    config = KINDS[kind]
    theirs, told, beside = random_weights(config, llama_gguf.LAYOUT), {}, {}
    if config.decoder.rope_scaling is not None:
        # llama3_scaling of llama.cpp's convert_hf_to_gguf.py: wavelengths, in places
        wavelength = 2 * np.pi * config.decoder.rope_base ** (2 * np.arange(5) / 10)
        share = np.clip((8192 / wavelength - 1) / 3, 0, 1)
        beside = {"rope_freqs.weight": np.float32(1 / ((1 - share) / 8 + share))}
    layout, found, params = read(write_gguf(tmp_path / "a.gguf", config, theirs | beside, **told))
    assert layout is llama_gguf.LAYOUT and found == config
    _, _, same = read(write_llama(tmp_path / "hf", config, random_weights(config)))
    assert_trees_equal(params, same)
    assert_trees_equal(dict(written(layout, config, params, theirs)), theirs)


def test_quantised_arrays_of_several_types_are_read_as_what_they_stand_for(tmp_path: Path):
    theirs = random_weights(GGUF, llama_gguf.LAYOUT)
    names = {"attn_q.weight": "Q8_0", "attn_v.weight": "F16", "ffn_up.weight": "Q4_1", "ffn_down.weight": "Q5_0"}
    types = {end: gguf.GGMLQuantizationType[name] for end, name in names.items()}
    _, config, params = read(write_gguf(tmp_path / "a.gguf", GGUF, theirs, types))
    back = dict(written(llama_gguf.LAYOUT, config, params, theirs))
    for key, array in theirs.items():
        kind = next((each for end, each in types.items() if key.endswith(end)), gguf.GGMLQuantizationType.F32)
        np.testing.assert_array_equal(back[key], gguf.dequantize(gguf.quantize(array, kind), kind), err_msg=key)


def test_the_tokenizer_of_a_gguf_is_the_one_that_it_was_made_of(tmp_path: Path):
    path = write_gguf(tmp_path / "a.gguf", GGUF, random_weights(GGUF, llama_gguf.LAYOUT))
    found = llama_gguf.LAYOUT.tokenizer(open_source(path))
    assert (found.eos_id, found.pad_id, found.bos_id) == (TOKENIZER.eos_id, TOKENIZER.eos_id, None)
    assert found.chat_template == "{{ messages }}" and found.vocab_size == TOKENIZER.vocab_size
    text = " the red circle, how many?"  # ours sets a space before a text
    assert found.tokenizer.encode(text).ids == TOKENIZER.tokenizer.encode(text[1:]).ids
    for text in ("Grün 5 é\n\t ü😀", "a  b   c", "<eos>x"):
        assert found.decode(found.tokenizer.encode(text).ids) == text
    assert TOKENIZER.eos_id not in found.tokenizer.encode("<eos>").ids  # of a user's words nothing is a mark


@pytest.mark.parametrize(
    ("pre", "digits"), [("gpt-2", ["Ġ1234"]), ("smollm", ["Ġ", "1", "2", "3", "4"]), ("llama-bpe", ["Ġ", "123", "4"])]
)
def test_a_text_is_cut_as_the_file_says(pre: str, digits: list[str], tmp_path: Path):
    path = write_gguf(tmp_path / "a.gguf", GGUF, random_weights(GGUF, llama_gguf.LAYOUT), tokenizer__ggml__pre=pre)
    tokenizer = llama_gguf.LAYOUT.tokenizer(open_source(path))
    assert [piece for piece, _ in tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234")][2:] == digits


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"llama__rope__scaling__type": "yarn"}, r"llama\.rope\.scaling\.type in .* is 'yarn'"),
        ({"llama__expert_count": 8}, r"llama\.expert_count in .* is 8"),
        ({"llama__rope__dimension_count": 4}, r"llama\.rope\.dimension_count in .* is not 8"),
        ({"tokenizer__ggml__model": "llama"}, r"the tokenizer of .* is of kind 'llama'"),
        ({"tokenizer__ggml__pre": "tekken"}, r"cut 'tekken', and what can be read here is gpt2"),
        ({"tokenizer__ggml__tokens": ["a", "b"]}, r"a tokenizer of another vocabulary than its table of 280 tokens"),
        ({"tokenizer__ggml__eos_token_id": 999}, r"the tokenizer of .* is damaged"),
        ({"tokenizer__ggml__merges": ["x y"]}, r"the tokenizer of .* is damaged"),
    ],
)
def test_a_gguf_that_cannot_be_expressed_is_refused(told: dict, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        read(write_gguf(tmp_path / "a.gguf", GGUF, random_weights(GGUF, llama_gguf.LAYOUT), **told))


def test_a_gguf_of_another_scaling_of_rotations_is_refused(tmp_path: Path):
    weights = random_weights(GGUF, llama_gguf.LAYOUT) | {"rope_freqs.weight": np.float32([1, 2, 3, 8])}
    with pytest.raises(UserError, match=r"rope_freqs\.weight in .* is not Llama 3's scaling"):
        read(write_gguf(tmp_path / "a.gguf", GGUF, weights))
