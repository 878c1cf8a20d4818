"""CLIP and SigLIP of random, perturbed weights compute what transformers computes, and go there and back."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlm_jax.contract import Input
from vlm_jax.data import Data
from vlm_jax.data.picture import Picture
from vlm_jax.experiment import Experiment
from vlm_jax.models import build
from vlm_jax.nn.vision import normalised
from vlm_jax.pretrained import clip_hf, siglip
from vlm_jax.pretrained.images import OPENAI_MEAN, OPENAI_STD
from vlm_jax.pretrained.layout import Layout, read_params, written, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.trees import leaves_by_path

RANDOM = np.random.default_rng(0)
VISION = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 99,
    "max_position_embeddings": 11,
}
IMAGE = RANDOM.integers(0, 256, (3, 24, 24, 3)).astype(np.uint8)
TOKENS = RANDOM.integers(10, 98, (3, 11)).astype(np.int32)
for row, end in enumerate((10, 4, 0)):
    TOKENS[row, end:] = 98
MODELS = {
    "openai": (CLIPModel, CLIPConfig, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-2}, {"eos_token_id": 2}),
    "laion": (CLIPModel, CLIPConfig, {"hidden_act": "gelu", "layer_norm_eps": 1e-2}, {"eos_token_id": 98}),
    "siglip": (SiglipModel, SiglipConfig, {"layer_norm_eps": 1e-2}, {"projection_size": 40}),
}
LAYOUTS: dict[str, Layout] = {"openai": clip_hf.LAYOUT, "laion": clip_hf.LAYOUT, "siglip": siglip.LAYOUT}
PROCESSORS = {"openai": CLIPImageProcessorPil, "laion": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}


def theirs(name: str) -> Any:
    """A model of random weights, of which none is where it starts: norms and biases, too."""
    torch.manual_seed(0)
    model, config, both, text = MODELS[name]
    whole = {"projection_dim": 20} if model is CLIPModel else {}
    built = model(config(vision_config={**VISION, **both}, text_config={**TEXT, **both, **text}, **whole)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


@pytest.fixture(scope="module", params=MODELS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A model of theirs, and the directory where they have saved it."""
    model, path = theirs(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    kind = PROCESSORS[request.param]
    sizes = {} if request.param == "siglip" else {"crop_size": {"height": 24, "width": 24}}
    whole = {"height": 24, "width": 24} if request.param == "siglip" else {"shortest_edge": 24}
    kind(size=whole, **sizes).save_pretrained(path)
    return request.param, model, path


def read(name: str, path: Path) -> tuple[Any, Any]:
    """The config and the variables that the layout makes of a directory."""
    source, layout = open_source(path), LAYOUTS[name]
    assert layout.recognises(source)
    config = layout.config(source)
    return config, {"params": read_params(layout, config, source.tensors)}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def outputs(name: str, model: Any) -> dict[str, np.ndarray]:
    """What theirs makes of the images and texts: embeddings, and every hidden state."""
    clip = name != "siglip"
    mean, std = (OPENAI_MEAN, OPENAI_STD) if clip else ((0.5,) * 3, (0.5,) * 3)
    pixels = torch.from_numpy(np.float32((IMAGE / 255 - mean) / std).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        tokens = torch.from_numpy(TOKENS).long()
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=tokens).pooler_output
        seen = model.vision_model(pixel_values=pixels, output_hidden_states=True)
        said = model.text_model(input_ids=tokens, output_hidden_states=True)
    patches = [state[:, 1:].numpy() if clip else state.numpy() for state in seen.hidden_states]
    return {
        "image": unit(image.numpy()),
        "text": unit(text.numpy()),
        **{f"image {i}": state for i, state in enumerate(patches)},
        **{f"text {i}": state.numpy() for i, state in enumerate(said.hidden_states)},
        "text last": said.last_hidden_state.numpy(),
    }


def ours(config: Any, variables: Any, left_out: int = 1) -> dict[str, np.ndarray]:
    """Embeddings, and features of so many layers less than there are."""
    config = replace(
        config, image=replace(config.image, features=left_out), text=replace(config.text, features=left_out)
    )
    model = build(config)
    run = jax.jit(
        lambda variables: {
            "image": model.embed_image(variables, IMAGE),
            "text": model.embed_text(variables, TOKENS),
            f"image {3 - left_out}": model.image_features(variables, IMAGE),
            f"text {2 - left_out}": model.text_features(variables, TOKENS)[0],
        }
    )
    return run(variables)


def assert_equal(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """To 1e-5 of the largest value, for hidden states reach 10 and more."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()), err_msg=name)


def test_a_published_model_computes_what_transformers_does(published: tuple[str, Any, Path]):
    """Embeddings, and the hidden states -1, -2 and 0 of both towers; the first follows CLIP's first norm."""
    name, model, path = published
    config, variables = read(name, path)
    expected = outputs(name, model)
    assert np.ptp(expected["image"], axis=0).max() > 0.01 and np.ptp(expected["text"], axis=0).max() > 0.01
    for left_out in (1, 2):
        for key, found in ours(config, variables, left_out).items():
            assert_equal(found, expected[key], key)


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        ("erf for quick GELU", {"activation": "gelu"}),
        ("eps", {"norm_eps": 1e-6}),
    ],
)
def test_a_wrong_setting_would_be_seen(published: tuple[str, Any, Path], fault: str, changes: dict[str, Any]):
    name, model, path = published
    config, variables = read(name, path)
    if all(getattr(config.image.transformer, key) == value for key, value in changes.items()):
        changes = {"activation": "quick_gelu"}
    expected = outputs(name, model)
    for tower in ("image", "text"):
        part = getattr(config, tower)
        wrong = replace(config, **{tower: replace(part, transformer=replace(part.transformer, **changes))})
        assert np.abs(ours(wrong, variables)[tower] - expected[tower]).max() > 4e-5, fault


def test_a_layer_too_many_would_be_seen(published: tuple[str, Any, Path]):
    name, model, path = published
    config, variables = read(name, path)
    found, expected = ours(config, variables, 2), outputs(name, model)
    assert np.abs(found["image 1"] - expected["image 2"]).max() > 0.1
    assert np.abs(found["text 0"] - expected["text 1"]).max() > 0.1


def test_what_is_written_is_read_by_transformers(published: tuple[str, Any, Path], tmp_path: Path):
    """No key is missing, none too many, and the settings are those that it computes the same with."""
    name, model, path = published
    config, variables = read(name, path)
    random = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + np.float32(0.1 * random.normal(size=leaf.shape)), variables["params"])
    layout = LAYOUTS[name]
    experiment = Experiment(
        model=config,
        data=Data(name=None, fields=layout.fields(open_source(path))),
        training=Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1),
    )
    assert layout.export is not None
    for file, content in layout.export(experiment, None).items():
        (tmp_path / file).write_text(json.dumps(content))
    arrays = dict(written(layout, config, moved, written_keys(layout, config, moved)))
    assert arrays.keys() == model.state_dict().keys()
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, found = MODELS[name][0].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = outputs(name, loaded.eval())
    for key, array in ours(config, {"params": moved}).items():
        assert_equal(array, expected[key], key)
    again, params = read(name, tmp_path)
    assert again == config
    for key, leaf in leaves_by_path(params["params"]).items():
        np.testing.assert_array_equal(leaf, leaves_by_path(moved)[key], err_msg=key)


@pytest.mark.parametrize("shape", [(41, 30), (30, 41), (24, 24), (9, 50), (57, 91)])
def test_images_are_made_as_its_processor_makes_them(published: tuple[str, Any, Path], shape: tuple[int, int]):
    """Of any shape, within a level of 256, as the processor on Pillow does it: where a picture is cut after it is
    scaled, we scale the cut, and the weights of the filter are rounded otherwise."""
    name, _, path = published
    config, _ = read(name, path)
    array = 80 + RANDOM.integers(0, 96, (*shape, 3)).astype(np.uint8)
    picture = PillowImage.fromarray(array)
    encoded = io.BytesIO()
    picture.save(encoded, "png")
    (image, _) = LAYOUTS[name].fields(open_source(path))
    record = {"image": Picture(encoded.getvalue(), "record 0")}
    made = image.read(record, {"image": Input((24, 24, 3), "uint8", 256)}, None, None)["image"]
    found = np.asarray(normalised(made[None], config.image))[0]
    expected = PROCESSORS[name].from_pretrained(path)(picture, return_tensors="np")["pixel_values"][0]
    std = np.array(config.image.std)
    np.testing.assert_allclose(found * std, expected.transpose(1, 2, 0) * std, atol=1.01 / 255)
