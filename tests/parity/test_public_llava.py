"""LLaVA's five layouts: what transformers computes of the same weights, read from each, and written back for it.

Weights are random and moved: norms, biases and scales are none of the ones that an initialisation gives.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from converted import TOKENIZER, assert_trees_equal
from tools.convert import convert
from vlm_jax.errors import UserError
from vlm_jax.models import llava
from vlm_jax.models.llava import LLaVA
from vlm_jax.nn import projector
from vlm_jax.nn.sequence import attention_mask, positions
from vlm_jax.nn.vocabulary import token_logits
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.layout import read_params, recognised
from vlm_jax.pretrained.source import open_source
from vlm_jax.workdir import load

IMAGE, VOCAB = TOKENIZER.vocab_size, TOKENIZER.vocab_size + 3
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
CONFIG = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=15,
        patch_size=5,
        projection_dim=8,
        layer_norm_eps=2e-3,
    ),
    text_config=LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=3e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        eos_token_id=TOKENIZER.eos_id,
    ),
    image_token_index=IMAGE,
    image_seq_length=9,
)
RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.integers(0, 256, (2, 1, 15, 15, 3)).astype(np.uint8)
IMAGE_AT = np.array([[2], [5]], np.int32)
TOKENS = RANDOM.integers(0, TOKENIZER.vocab_size, (2, 24)).astype(np.int32)
for row, (at,) in enumerate(IMAGE_AT):
    TOKENS[row, at : at + 9] = IMAGE


def renamed(*changes: tuple[str, str]) -> Callable[[str], str]:
    """The key of `state_dict()` of transformers 5 with the first beginning that fits changed."""

    def rename(key: str) -> str:
        old, new = next(((old, new) for old, new in changes if key.startswith(old)), ("", ""))
        return new + key.removeprefix(old)

    return rename


PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")
FILE = (PROJECTOR, ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
RENAMED = {
    "llava": renamed(("model.vision_tower.", "vision_tower.vision_model."), *FILE),
    "llava-v5": renamed(("model.vision_tower.", "vision_tower."), *FILE),
    "llava-state-v4": renamed(("model.vision_tower.", "model.vision_tower.vision_model.")),
    "llava-state-v5": renamed(),
    "llava-original": renamed(
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ),
}


def perturbed() -> torch.nn.Module:
    """A model of transformers with random weights, of which none is what an initialisation makes it."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(CONFIG, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model


def theirs_of(model: torch.nn.Module) -> np.ndarray:
    pixels = (PICTURES[:, 0].astype(np.float32) / 255 - MEAN) / STD
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(TOKENS.astype(np.int64)),
            pixel_values=torch.from_numpy(np.float32(pixels).transpose(0, 3, 1, 2)),
        ).logits.numpy()


def ours_of(config: llava.Config, params: Any) -> np.ndarray:
    """Of the token after each place."""

    def logits(module: LLaVA, tokens: jax.Array, image: jax.Array, image_at: jax.Array) -> jax.Array:
        segment = jnp.ones_like(tokens)
        x, _ = module.language.decoder(
            module.embed(tokens, image, image_at), positions(segment), attention_mask(segment)
        )
        return token_logits(x, module.language.outputs())

    apply = partial(LLaVA(config).apply, {"params": params}, method=logits)
    return np.asarray(jax.jit(apply)(TOKENS, PICTURES, IMAGE_AT))


def write(directory: Path, name: str, model: torch.nn.Module, **told: Any) -> Path:
    """A directory in a layout."""
    directory.mkdir()
    weights = {RENAMED[name](key): value.clone() for key, value in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors")
    settings = CONFIG.to_dict()
    if name == "llava-original":
        own = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
        settings = settings["text_config"] | own | {"vision_config": settings["vision_config"], "model_type": "llava"}
    (directory / "config.json").write_text(json.dumps(settings | told, default=str))
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD, "size": 15, "crop_size": 15, "do_center_crop": True})
    )
    TOKENIZER.save(directory / "tokenizer.json")
    return directory


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model, path = perturbed(), tmp_path_factory.mktemp("published")
    return {name: write(path / name, name, model) for name in RENAMED}


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return theirs_of(perturbed())


def test_logits_are_those_of_transformers_and_what_is_written_is_read_by_it(
    published: dict[str, Path], expected: np.ndarray, tmp_path: Path
):
    assert expected.std() > 0.5
    convert(str(published["llava"]), tmp_path / "run")
    loaded = load(tmp_path / "run")
    config = loaded.experiment.model
    assert config.image_tokens == 9 and config.vision.mean == MEAN
    found = ours_of(config, loaded.variables["params"])
    np.testing.assert_allclose(found / expected.std(), expected / expected.std(), atol=1e-5)

    convert(str(tmp_path / "run"), tmp_path / "back", layout="llava")
    back, told = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    replaced = {key: value.clone() for key, value in back.state_dict().items()}
    for key, value in perturbed().state_dict().items():
        torch.testing.assert_close(replaced[key], value, rtol=0, atol=0)
    assert back.config.vision_feature_layer == -2 and back.config.image_seq_length == 9


@pytest.mark.parametrize("name", RENAMED)
def test_every_layout_is_recognised_and_read_alike(published: dict[str, Path], name: str):
    first, source = open_source(published["llava"]), open_source(published[name])
    layout = recognised(source, LAYOUTS)
    assert layout.name == name
    config = layout.config(source)
    known = recognised(first, LAYOUTS)
    assert config == known.config(first)
    assert_trees_equal(read_params(layout, config, source.tensors), read_params(known, config, first.tensors))


@pytest.mark.parametrize("fault", ["tanh projector", "another layer", "eps"])
def test_a_fault_is_seen(published: dict[str, Path], expected: np.ndarray, fault: str, monkeypatch: pytest.MonkeyPatch):
    """What the comparison above allows is less than each of these does."""
    source = open_source(published["llava"])
    layout = recognised(source, LAYOUTS)
    config = layout.config(source)
    params = read_params(layout, config, source.tensors)
    if fault == "tanh projector":
        monkeypatch.setattr(projector.nn, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=True))
    if fault == "another layer":
        config = replace(config, vision=replace(config.vision, features=0))
    if fault == "eps":
        transformer = replace(config.vision.transformer, norm_eps=1e-3)
        config = replace(config, vision=replace(config.vision, transformer=transformer))
    assert np.abs(ours_of(config, params) - expected).max() / expected.std() > 2e-5


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act in .* is 'relu', which the model cannot express"),
        ({"vision_feature_layer": -1}, "are of the last layer, before its norm: only earlier ones are read"),
        ({"vision_feature_layer": [-2, -3]}, r"vision_feature_layer in .* is \[-2, -3\], and features are of one"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy in .* is 'full'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias in .* is False"),
    ],
)
def test_settings_that_the_model_cannot_express_are_refused_by_name(
    told: dict[str, Any], message: str, published: dict[str, Path], tmp_path: Path
):
    directory = tmp_path / "odd"
    directory.mkdir()
    for file in published["llava"].iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "config.json").unlink()
    settings = json.loads((published["llava"] / "config.json").read_text()) | told
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        convert(str(directory), tmp_path / "run")
    assert not (tmp_path / "run").exists()
