"""LLaVA's layouts: one table under five sets of keys, read alike, and what no layout holds is refused by name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from converted import TOKENIZER, assert_trees_equal
from reference import random_params
from vlm_jax.data import Data, Text
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import language, llava
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.images import OPENAI_MEAN, OPENAI_STD
from vlm_jax.pretrained.layout import abstract_params, read_params, recognised, written, written_keys
from vlm_jax.pretrained.llava import KEYS, export
from vlm_jax.pretrained.source import open_source
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

CONFIG = llava.Config(
    vision=VisionTransformer(
        image_size=6,
        patch_size=3,
        pre_norm=True,
        patch_bias=False,
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        features=1,
        transformer=Transformer(width=6, depth=2, heads=3, mlp=10, activation="quick_gelu", norm_eps=1e-5),
    ),
    language=language.Config(
        vocab_size=TOKENIZER.vocab_size,
        context_length=32,
        eos_id=TOKENIZER.eos_id,
        decoder=DecoderConfig(width=12, depth=1, heads=2, kv_heads=1, head_width=6, mlp=10),
    ),
)
PARAMS = random_params(abstract_params(CONFIG), 0.3)
EXPERIMENT = Experiment(
    model=CONFIG,
    data=Data(name=None, text=Text(vocab_size=CONFIG.language.vocab_size)),
    training=Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1),
)
OWN = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
"""Of the authors' config.json."""


def write(directory: Path, name: str, without: str = "^$") -> Path:
    """Weights of a layout, but for the keys that `without` finds, and its config.json."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    weights = dict(written(layout, CONFIG, PARAMS, written_keys(layout, CONFIG, PARAMS)))
    directory.mkdir()
    save_file(
        {key: array for key, array in weights.items() if not re.search(without, key)}, directory / "model.safetensors"
    )
    told = dict(export(EXPERIMENT, TOKENIZER)["config.json"])
    if name == "llava-original":
        told = {**told["text_config"], **OWN, "vision_config": told["vision_config"]}
    (directory / "config.json").write_text(json.dumps(told))
    TOKENIZER.save(directory / "tokenizer.json")
    return directory


@pytest.mark.parametrize("name", KEYS)
def test_each_layout_is_recognised_and_reads_back_what_was_written(name: str, tmp_path: Path):
    source = open_source(write(tmp_path / "weights", name))
    layout = recognised(source, LAYOUTS)
    assert (layout.name, layout.config(source)) == (name, CONFIG)
    assert_trees_equal(read_params(layout, CONFIG, source.tensors), PARAMS)


def test_the_authors_weights_without_a_tower_are_refused_with_what_has_one(tmp_path: Path):
    source = open_source(write(tmp_path / "weights", "llava-original", without="vision_tower"))
    with pytest.raises(UserError, match=r"holds no image tower, which LLaVA's authors left out .*llava-1\.5-7b-hf"):
        recognised(source, LAYOUTS).config(source)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, projector="linear"), "projector is 'linear' and LLaVA's layouts have 'mlp2x_gelu' alone"),
        (replace(CONFIG, shuffle=2), "shuffle is 2 and LLaVA's layouts have 1 alone"),
        (replace(CONFIG, attention="prefix"), "attention is 'prefix'"),
        (replace(CONFIG, vision=replace(CONFIG.vision, pre_norm=False)), "vision.pre_norm is False"),
        (replace(CONFIG, vision=replace(CONFIG.vision, features=0)), "vision.features is 0"),
    ],
)
def test_a_model_that_no_layout_holds_is_refused_by_its_setting(config: llava.Config, message: str):
    with pytest.raises(UserError, match=message):
        export(replace(EXPERIMENT, model=config), TOKENIZER)
