"""The layouts of encoders of text: T5's half and CLIP's tower alone, there and back, and what they refuse."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from converted import TOKENIZER as TRAINED
from converted import assert_trees_equal
from reference import random_params
from tools.convert import convert
from tools.evaluate import choose
from vlm_jax.data import Caption, Data, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.evals import Subject
from vlm_jax.experiment import Experiment
from vlm_jax.models import text_encoder
from vlm_jax.nn.t5 import T5
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.layout import abstract_params, named, read_params, recognised, written, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.workdir import load

TOKENIZER = replace(TRAINED, bos_id=None, eos_id=TRAINED.vocab_size - 1)
ENCODER = T5(
    vocab_size=TOKENIZER.vocab_size,
    context_length=24,
    eos_id=TOKENIZER.eos_id,
    width=12,
    depth=2,
    heads=3,
    head_width=5,
    mlp=20,
    buckets=8,
    max_distance=20,
    norm_eps=1e-4,
)
TOWER = TextTransformer(
    vocab_size=TOKENIZER.vocab_size,
    context_length=24,
    eos_id=TOKENIZER.eos_id,
    transformer=Transformer(width=12, depth=2, heads=3, mlp=20, activation="gelu", norm_eps=1e-5),
)
SHARED, REPEATED = "shared.weight", "encoder.embed_tokens.weight"
CASES: dict[str, tuple[str, Any]] = {
    "gated": ("t5", ENCODER),
    "relu": ("t5", replace(ENCODER, feed_forward="relu")),
    "unrolled": ("t5", replace(ENCODER, scan=False)),
    "clip": ("clip-text", TOWER),
    "clip of version 5": ("clip-text-v5", TOWER),
}
"""By name the layout and the network."""


def experiment_of(model: Any) -> Experiment:
    training = Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1)
    return Experiment(model=model, data=Data(name=None, fields=(Caption(),)), training=training)


def exported(name: str, model: Any, tokenizer: Tokenizer | None = TOKENIZER) -> dict[str, Any]:
    export = named(LAYOUTS, name).export
    assert export is not None
    return dict(export(experiment_of(model), tokenizer))


def write(directory: Path, case: str, beside: dict[str, np.ndarray] | None = None, **told: Any) -> tuple[Any, Path]:
    """Random parameters, and the directory where they are as published.

    Args:
      beside: other arrays of the file.
      told: other settings of its config.json.
    """
    name, network = CASES[case]
    config, layout = text_encoder.Config(network=network), named(LAYOUTS, name)
    params = random_params(abstract_params(config), 0.3)
    directory.mkdir(exist_ok=True)
    arrays = dict(written(layout, config, params, written_keys(layout, config, params)))
    save_file(arrays | (beside or {}), directory / "model.safetensors")
    settings = exported("clip-text" if name.startswith("clip") else name, config)["config.json"]
    (directory / "config.json").write_text(json.dumps(settings | told))
    TOKENIZER.save(directory / "tokenizer.json")
    return params, directory


def read(path: Path, name: str | None = None) -> tuple[str, Any, Any]:
    """The layout, the network, and the parameters."""
    source = open_source(path)
    layout = recognised(source, LAYOUTS, name)
    config = layout.config(source)
    assert layout.fields(source) == (Caption(),)
    return layout.name, config.network, read_params(layout, config, source.tensors)


@pytest.mark.parametrize("case", CASES)
def test_settings_and_arrays_go_there_and_back(case: str, tmp_path: Path):
    name, network = CASES[case]
    params, path = write(tmp_path, case)
    found, config, again = read(path)
    assert found == name
    if case == "unrolled":  # which is no setting of what is published
        assert config == ENCODER
    else:
        assert config == network
        assert_trees_equal(again, params)


def test_keys_are_those_of_hugging_face():
    """By `T5EncoderModel` and `CLIPTextModel` of transformers 4."""
    config = text_encoder.Config(network=ENCODER)
    params = random_params(abstract_params(config))
    layout = named(LAYOUTS, "t5")
    arrays = dict(written(layout, config, params, written_keys(layout, config, params)))
    names = ["layer.0.layer_norm", *(f"layer.0.SelfAttention.{name}" for name in "qkvo"), "layer.1.layer_norm"]
    names += [f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    blocks = {f"encoder.block.{i}.{name}.weight" for i in (0, 1) for name in names}
    assert arrays.keys() == {SHARED, bias, "encoder.final_layer_norm.weight", *blocks}
    ours = params["network"]["blocks"]
    gate = arrays["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"]
    np.testing.assert_array_equal(gate, ours["mlp"]["gate"]["kernel"][1].T)
    up = arrays["encoder.block.1.layer.1.DenseReluDense.wi_1.weight"]
    np.testing.assert_array_equal(up, ours["mlp"]["up"]["kernel"][1].T)
    assert arrays[bias].shape == (8, 3)


@pytest.mark.parametrize("case", ["gated", "relu"])
def test_a_decoder_beside_the_encoder_is_passed_over(case: str, tmp_path: Path):
    decoder = {
        "decoder.block.0.layer.0.SelfAttention.q.weight": np.ones((15, 12), np.float32),
        "decoder.embed_tokens.weight": np.ones((280, 12), np.float32),
        "lm_head.weight": np.ones((280, 12), np.float32),
    }
    params, path = write(tmp_path, case, decoder, architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    assert_trees_equal(read(path)[2], params)


def test_the_table_may_be_there_twice_and_must_be_the_same(tmp_path: Path):
    params, path = write(tmp_path, "gated")
    table = params["network"]["token"]["embedding"]
    assert_trees_equal(read(write(tmp_path, "gated", {REPEATED: table.copy()})[1])[2], params)
    with pytest.raises(UserError, match=r"encoder\.embed_tokens\.weight in .* is another table than it repeats"):
        read(write(path, "gated", {REPEATED: table + 1})[1])


@pytest.mark.parametrize("case", ["clip", "clip of version 5"])
def test_a_projection_and_places_beside_the_tower_are_passed_over(case: str, tmp_path: Path):
    prefix = "text_model." if case == "clip" else ""
    places = {f"{prefix}embeddings.position_ids": np.arange(24)[None]}
    params, path = write(tmp_path, case, {"text_projection.weight": np.ones((7, 12), np.float32), **places})
    assert_trees_equal(read(path)[2], params)


def test_an_end_token_of_2_means_the_highest_id(tmp_path: Path):
    """As Stable Diffusion's config.json has it; transformers goes by the highest id then."""
    _, path = write(tmp_path, "clip", eos_token_id=2)
    assert read(path)[1] == replace(TOWER, eos_id=TOKENIZER.vocab_size - 1)


@pytest.mark.parametrize("case", ["gated", "clip"])
def test_what_config_json_leaves_out_is_what_transformers_makes_of_it(case: str, tmp_path: Path):
    _, path = write(tmp_path, case)
    kind = {"gated": "t5", "clip": "clip_text_model"}[case]
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    source = open_source(path)
    found = recognised(source, LAYOUTS).config(source).network
    if case == "gated":
        small = T5(vocab_size=32_128, width=512, depth=6, heads=8, mlp=2048, feed_forward="relu")
        assert found == small
    else:
        assert (found.vocab_size, found.context_length, found.eos_id) == (49_408, 77, 49_407)
        assert found.transformer == Transformer(
            width=512, depth=12, heads=8, mlp=2048, activation="quick_gelu", norm_eps=1e-5
        )


@pytest.mark.parametrize("case", ["gated", "clip"])
def test_bfloat16_is_what_bfloat16_weights_are_computed_in(case: str, tmp_path: Path):
    _, path = write(tmp_path, case)
    arrays = load_file(path / "model.safetensors")
    save_file({key: array.astype(jnp.bfloat16) for key, array in arrays.items()}, path / "model.safetensors")
    _, network, params = read(path)
    assert getattr(network, "transformer", network).dtype == "bfloat16"
    assert params["network"]["token"]["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("case", "told", "words"),
    [
        ("gated", {"model_type": "umt5"}, "model_type in .* is 'umt5', which the model cannot express: 't5' is"),
        ("gated", {"is_decoder": True}, "is_decoder in .* is True"),
        ("gated", {"quantization_config": {"bits": 4}}, "quantization_config in .* is"),
        (
            "gated",
            {"feed_forward_proj": "gated-silu"},
            "feed_forward_proj in .* is 'gated-silu': there are relu, gated",
        ),
        ("gated", {"feed_forward_proj": ["relu"]}, r"feed_forward_proj in .* is \['relu'\]"),
        ("gated", {"dense_act_fn": "gelu"}, "dense_act_fn in .* is 'gelu', which the model cannot express: 'gelu_new'"),
        ("relu", {"is_gated_act": True}, "is_gated_act in .* is True"),
        ("gated", {"eos_token_id": [1, 2]}, r"eos_token_id in .* is \[1, 2\]: a text ends at one token"),
        ("gated", {"d_kv": "64"}, "does not hold the settings of an encoder"),
        ("gated", {"relative_attention_num_buckets": 7}, "settings of an encoder .*buckets is 7"),
        ("gated", {"layer_norm_epsilon": None}, "settings of an encoder .*norm_eps"),
        ("clip", {"hidden_act": "silu"}, "hidden_act in .* is 'silu'"),
        ("clip", {"attention_dropout": 0.1}, "attention_dropout in .* is 0.1"),
        ("clip", {"eos_token_id": [1, 2]}, r"eos_token_id in .* is \[1, 2\]"),
    ],
)
def test_a_setting_that_cannot_be_expressed_is_refused_by_its_name(
    case: str, told: dict[str, Any], words: str, tmp_path: Path
):
    _, path = write(tmp_path, case, **told)
    with pytest.raises(UserError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("case", "layout", "words"),
    [
        ("clip", "t5", r"lacks shared\.weight: it is of another layout"),
        ("gated", "clip-text", "model_type in .* is 't5': give the text tower of a CLIP alone"),
        ("clip", "clip-text-v5", r"lacks final_layer_norm\.weight: it is of another layout"),
        ("gated", "llama", r"lacks model\.embed_tokens\.weight: it is of another layout"),
    ],
)
def test_another_layout_that_is_asked_for_is_refused(case: str, layout: str, words: str, tmp_path: Path):
    _, path = write(tmp_path, case)
    with pytest.raises(UserError, match=words):
        read(path, layout)


def test_an_array_too_many_too_few_or_of_another_shape_is_refused_by_its_name(tmp_path: Path):
    key = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    with pytest.raises(UserError, match=r"holds encoder\.block\.2\.layer\.0\.layer_norm\.weight, which t5 of these"):
        read(write(tmp_path, "gated", {"encoder.block.2.layer.0.layer_norm.weight": np.ones(12, np.float32)})[1])
    with pytest.raises(UserError, match=r"wi_0\.weight .* is \[21, 12\] and would be \[12, 21\] where .* \[12, 20\]"):
        read(write(tmp_path, "gated", {key: np.ones((21, 12), np.float32)})[1])
    _, path = write(tmp_path, "gated")
    arrays = load_file(path / "model.safetensors")
    del arrays[SHARED]
    save_file(arrays, path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks shared\.weight"):
        read(path)


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("t5", lambda: text_encoder.Config(network=TOWER), "network is 'TextTransformer' and T5's layouts have 'T5'"),
        ("clip-text", lambda: text_encoder.Config(network=ENCODER), "network is 'T5' and CLIP's layouts have"),
        (
            "clip-text",
            lambda: text_encoder.Config(network=replace(TOWER, pool="last")),
            r"network\.pool is 'last' and CLIP's layouts have 'eos' alone: the model stays a run",
        ),
        ("clip-text", lambda: text_encoder.Config(network=replace(TOWER, eos_id=2)), r"text\.eos_id is 2, which"),
    ],
)
def test_what_a_layout_cannot_express_is_not_written(layout: str, change: Callable[[], Any], words: str):
    with pytest.raises(UserError, match=words):
        exported(layout, change())


def test_special_tokens_are_written_as_the_tokenizer_has_them():
    model = text_encoder.Config(network=TOWER)
    told = exported("clip-text", model)["config.json"]
    assert [told[f"{name}_token_id"] for name in ("bos", "pad", "eos")] == [None, 0, TOKENIZER.eos_id]
    assert exported("clip-text", model, None)["config.json"].keys() == told.keys() - {"bos_token_id", "pad_token_id"}
    model = text_encoder.Config(network=ENCODER)
    padded = replace(TOKENIZER, pad_id=5)
    found = [exported("t5", model, tokenizer)["config.json"]["pad_token_id"] for tokenizer in (None, padded)]
    assert found == [0, 5]


@pytest.mark.parametrize("case", ["gated", "clip"])
def test_an_encoder_becomes_a_run_and_goes_back_with_its_tokenizer(case: str, tmp_path: Path):
    layout, network = CASES[case]
    params, path = write(tmp_path / "source", case)
    told = convert(str(path), tmp_path / "run")
    assert told.endswith(f"parameters in float32, of layout {layout}")
    loaded = load(tmp_path / "run")
    assert loaded.experiment.model == text_encoder.Config(network=network)
    assert loaded.tokenizer is not None and loaded.tokenizer.same(TOKENIZER)
    assert_trees_equal(loaded.variables["params"], params)
    tokens = loaded.tokenizer.encode(["the red circle", ""], network.context_length)
    features, inside = loaded.model.text_features(loaded.variables, tokens)
    assert features.shape == (2, 24, 12) and inside.sum(axis=1).tolist() == (tokens != TOKENIZER.pad_id).sum(1).tolist()
    with pytest.raises(UserError, match=r"does nothing that an evaluation measures: give a run of what it is a part"):
        choose(Subject(model=loaded.model, variables=loaded.variables, batches=lambda: iter(()), examples=0), ())
    convert(str(tmp_path / "run"), tmp_path / "out", layout=layout)
    assert_trees_equal(*(load_file(tmp_path / each / "model.safetensors") for each in ("source", "out")))
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for row in tokens:  # for others, whose texts end where the file says so
        text = TOKENIZER.decode(row)
        assert written.encode(text).ids == row[: 1 + row.tolist().index(TOKENIZER.eos_id)].tolist()
    convert(str(tmp_path / "out"), tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.experiment == loaded.experiment and again.tokenizer.same(loaded.tokenizer)


def test_a_tokenizer_that_ends_texts_otherwise_is_refused(tmp_path: Path):
    _, path = write(tmp_path / "source", "gated", eos_token_id=1)
    with pytest.raises(UserError, match=r"ends a text with the id 279 and the model's eos_id is 1: make them agree"):
        convert(str(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
