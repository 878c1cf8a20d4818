"""Encoders of text of random, perturbed weights compute what transformers computes, and go there and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

from vlm_jax.contract import abstract_batch
from vlm_jax.data import Caption, Data
from vlm_jax.experiment import Experiment
from vlm_jax.models import build, text_encoder
from vlm_jax.nn.t5 import bucket_of
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.layout import named, read_params, recognised, written, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.trees import count_parameters, leaves_by_path

LENGTH, VOCAB, EOS = 150, 99, 98
DEPTH = 3
T5_SIZES = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 40,
    "num_layers": DEPTH,
    "num_heads": 3,
    "layer_norm_epsilon": 1e-2,
    "eos_token_id": EOS,
    "n_positions": LENGTH,
}
CLIP_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "max_position_embeddings": LENGTH,
    "layer_norm_eps": 1e-2,
}
MODELS: dict[str, tuple[str, Any, Any]] = {
    "v1.0": ("t5", T5EncoderModel, T5Config(**T5_SIZES, feed_forward_proj="relu")),
    "v1.1": ("t5", T5EncoderModel, T5Config(**T5_SIZES, feed_forward_proj="gated-gelu")),
    "whole": ("t5", T5ForConditionalGeneration, T5Config(**T5_SIZES, feed_forward_proj="gated-gelu")),
    "clip": ("clip-text", CLIPTextModelWithProjection, CLIPTextConfig(**CLIP_SIZES, eos_token_id=2)),
    "clip-v5": ("clip-text-v5", CLIPTextModel, CLIPTextConfig(**CLIP_SIZES, eos_token_id=EOS, hidden_act="gelu")),
}
"""Of each the layout that it is published in, and its model."""
WRITTEN = {"t5": T5EncoderModel, "clip-text": CLIPTextModel}
"""What reads the layouts that are written."""
TOKENS = np.random.default_rng(0).integers(2, EOS, (3, LENGTH)).astype(np.int32)
ENDS = (LENGTH - 1, 40, 0)
for row, end in enumerate(ENDS):
    TOKENS[row, end:] = 0
    TOKENS[row, end] = EOS
INSIDE = np.arange(LENGTH) <= np.array(ENDS)[:, None]


def theirs(name: str) -> Any:
    """A model of random weights, of which none is where it starts: norms and biases, too."""
    torch.manual_seed(0)
    _, model, config = MODELS[name]
    built = model(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


@pytest.fixture(scope="module", params=MODELS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A model of theirs, and the directory where they have saved it."""
    model, path = theirs(request.param), tmp_path_factory.mktemp("published")
    model.save_pretrained(path)
    return request.param, model, path


def read(path: Path, name: str) -> tuple[Any, Any]:
    """The config and the variables that the layout makes of a directory."""
    source = open_source(path)
    layout = recognised(source, LAYOUTS)
    assert layout.name == name
    config = layout.config(source)
    return config, {"params": read_params(layout, config, source.tensors)}


def outputs(model: Any) -> list[np.ndarray]:
    """Hidden states before each block and after the final norm, where nothing attends to padding."""
    encoder = model.get_encoder() if isinstance(model, T5ForConditionalGeneration) else model
    with torch.no_grad():
        found = encoder(
            input_ids=torch.from_numpy(TOKENS).long(),
            attention_mask=torch.from_numpy(INSIDE.astype(np.int64)),
            output_hidden_states=True,
        )
    return [*(state.numpy() for state in found.hidden_states[:DEPTH]), found.last_hidden_state.numpy()]


def ours(config: Any, variables: Any, left_out: int = 0) -> np.ndarray:
    """Features of so many layers less than there are; 0: after the final norm."""
    model = build(replace(config, network=replace(config.network, features=left_out)))
    features, inside = jax.jit(model.text_features)(variables, TOKENS)
    np.testing.assert_array_equal(inside, INSIDE)
    return np.asarray(features)


def assert_equal(found: np.ndarray, expected: np.ndarray) -> None:
    """Within the texts, to 1e-5 of the largest value, for hidden states reach 10 and more."""
    atol = 1e-5 * max(1, np.abs(expected[INSIDE]).max())
    np.testing.assert_allclose(found[INSIDE], expected[INSIDE], rtol=0, atol=atol)


def test_a_published_encoder_computes_what_transformers_does(published: tuple[str, Any, Path]):
    """At every layer, of texts of three lengths."""
    name, model, path = published
    config, variables = read(path, MODELS[name][0])
    expected = outputs(model)
    assert np.ptp(expected[-1], axis=1).max() > 1
    for left_out in range(DEPTH + 1):
        assert_equal(ours(config, variables, left_out), expected[DEPTH - left_out])


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("eps", {"norm_eps": 1e-6}),
        ("relu for GELU", {"feed_forward": "relu"}),
        ("buckets to another distance", {"max_distance": 100}),
    ],
)
def test_a_wrong_setting_would_be_seen(fault: str, changes: dict[str, Any], tmp_path: Path):
    model = theirs("v1.1")
    model.save_pretrained(tmp_path)
    config, variables = read(tmp_path, "t5")
    if "feed_forward" in changes:
        del variables["params"]["network"]["blocks"]["mlp"]["gate"]
    wrong = replace(config, network=replace(config.network, **changes))
    expected = outputs(model)[-1]
    assert np.abs(ours(wrong, variables) - expected)[INSIDE].max() > 1e-3, fault


def test_what_is_written_is_read_by_transformers(published: tuple[str, Any, Path], tmp_path: Path):
    """No key is missing, none too many, and the settings are those that it computes the same with."""
    name, _, path = published
    written_as = MODELS[name][0].removesuffix("-v5")
    layout = named(LAYOUTS, written_as)
    config, variables = read(path, MODELS[name][0])
    random = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + np.float32(0.1 * random.normal(size=leaf.shape)), variables["params"])
    experiment = Experiment(
        model=config,
        data=Data(name=None, fields=(Caption(),)),
        training=Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1),
    )
    assert layout.export is not None
    for file, content in layout.export(experiment, None).items():
        (tmp_path / file).write_text(json.dumps(content))
    arrays = dict(written(layout, config, moved, written_keys(layout, config, moved)))
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, found = WRITTEN[written_as].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(ours(config, {"params": moved}), outputs(loaded.eval())[-1])
    again, params = read(tmp_path, written_as)
    assert again == config
    for key, leaf in leaves_by_path(params["params"]).items():
        np.testing.assert_array_equal(leaf, leaves_by_path(moved)[key], err_msg=key)


def test_distances_fall_into_their_buckets():
    """Those of the published models, in float32 by theirs."""
    far = 1000
    expected = T5Attention._relative_position_bucket(torch.arange(-far, far + 1)).numpy()
    found = np.array([bucket_of(distance, text_encoder.T5_V1_1_XXL) for distance in range(far + 1)])
    np.testing.assert_array_equal(expected, [*found[::-1], *(16 + found[1:])])


@pytest.mark.parametrize("size", ["SMALL", "BASE", "LARGE", "XL", "XXL"])
def test_published_sizes_have_as_many_parameters(size: str):
    network = getattr(text_encoder, f"T5_V1_1_{size}")
    with torch.device("meta"):
        model = T5EncoderModel(
            T5Config(
                vocab_size=network.vocab_size,
                d_model=network.width,
                d_kv=network.head_width,
                d_ff=network.mlp,
                num_layers=network.depth,
                num_heads=network.heads,
                feed_forward_proj="gated-gelu",
            )
        )
    own = build(text_encoder.Config(network=network))
    shapes = jax.eval_shape(own.init, jax.random.key(0), abstract_batch(own.inputs, 1))
    assert count_parameters(shapes) == sum(parameter.numel() for parameter in model.parameters())
