"""Pipelines of latent diffusion as runs: what is computed of the empty caption, and the way back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from converted import assert_trees_equal
from published_pipelines import CONFIGS, READER, publish
from tools.convert import convert
from tools.sample import Options, sample
from vlm_jax.errors import UserError
from vlm_jax.experiment import to_record
from vlm_jax.models import build
from vlm_jax.pretrained import convert as conversion
from vlm_jax.pretrained.layout import nested
from vlm_jax.pretrained.pipelines import UNTOLD, empty_caption
from vlm_jax.trees import leaves_by_path, part
from vlm_jax.workdir import load

pytestmark = pytest.mark.slow  # whole pipelines there and back; their tables are in test_pipeline_layouts.py
DIRECTORIES = {"stable-diffusion": "unet", "dit": "transformer", "pixart": "transformer"}
"""Of each pipeline the one of its network."""
NULL = "caption_projection.y_embedding"


@pytest.fixture(scope="module", params=DIRECTORIES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Its name, where it is published, and the run that it becomes."""
    path = tmp_path_factory.mktemp("converted")
    publish(request.param, path / "pipe")
    told = convert(str(path / "pipe"), path / "run")
    assert "parameters in float32, of layout" in told and "2,765,633 of them are drawn, which no such file" in told
    return request.param, path / "pipe", path / "run"


def test_what_tells_nothing_is_what_the_encoder_makes_of_the_empty_caption(converted: tuple[str, Path, Path]):
    """All of it, padding too, where that is read; of PixArt what is read, in all places."""
    name, _, run = converted
    loaded = load(run)
    if name == "dit":
        assert "untold" not in loaded.variables["params"]["prior"]
        return
    reader = build(CONFIGS[name].prior.text)
    tokens = READER.encode([""], reader.inputs["tokens"].shape[0])
    assert reader.text_features is not None and tokens[0].tolist() == [READER.eos_id] + [0] * (len(tokens[0]) - 1)
    features, inside = jax.jit(reader.text_features)(part(part(loaded.variables, "prior"), "text"), tokens)
    assert np.sum(inside) == 1
    untold = loaded.variables["params"]["prior"]["untold"]["features"]
    expected = np.asarray(features[0]) if name == "stable-diffusion" else np.repeat(features[0][:1], 120, axis=0)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(untold, expected, atol=1e-5)


def test_a_pipeline_goes_back_into_what_it_was_made_of(converted: tuple[str, Path, Path], tmp_path: Path):
    name, pipe, run = converted
    told = convert(str(run), tmp_path / "out", layout=name)
    assert told == f"{tmp_path / 'out'} holds step 0 of {run}, of layout {name}"
    files = {file.relative_to(pipe) for file in pipe.rglob("*") if file.is_file()}
    assert files <= {file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*") if file.is_file()}
    for file in files:
        if file.suffix == ".safetensors":
            assert_trees_equal(load_file(tmp_path / "out" / file), load_file(pipe / file))
        elif file.parent.name != "tokenizer":
            assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((pipe / file).read_text()), file
    convert(str(tmp_path / "out"), tmp_path / "again")
    first, again = load(run), load(tmp_path / "again")
    assert again.experiment == first.experiment and first.experiment.sampling.guidance > 1
    assert first.tokenizer is None or again.tokenizer.same(first.tokenizer)
    assert_trees_equal(again.variables, first.variables)


def test_weights_in_several_files_have_an_index_in_each_directory(
    converted: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name, pipe, run = converted
    monkeypatch.setattr(conversion, "SHARD", 4_000)
    convert(str(run), tmp_path / "out", layout=name)
    directory = tmp_path / "out" / DIRECTORIES[name]
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((directory / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    found = {key: array for shard in shards for key, array in load_file(shard).items()}
    assert index.keys() == found.keys() and set(index.values()) == {shard.name for shard in shards}
    assert_trees_equal(found, load_file(pipe / DIRECTORIES[name] / "diffusion_pytorch_model.safetensors"))
    monkeypatch.undo()
    convert(str(tmp_path / "out"), tmp_path / "again")
    assert_trees_equal(load(tmp_path / "again").variables, load(run).variables)


def trained(run: Path, workdir: Path, path: str, change: float) -> Path:
    """The run with a parameter that has moved, by a share of its deviation."""
    loaded = load(run)
    leaves = leaves_by_path(loaded.variables)
    leaf = np.asarray(leaves[f"params/{path}"])
    leaves[f"params/{path}"] = leaf + np.float32(change * np.std(leaf))
    record = to_record("try", loaded.experiment, {})
    conversion.save(workdir, record, nested(leaves), loaded.experiment, loaded.tokenizer)
    return workdir


def test_what_tells_nothing_is_written_where_it_has_been_trained_or_refused(
    converted: tuple[str, Path, Path], tmp_path: Path
):
    """Where a text encoder has moved on and it has not, too; rounding is no training."""
    name, _, run = converted
    if name == "dit":
        pytest.skip("it is told no text")
    convert(str(trained(run, tmp_path / "rounded", UNTOLD, 0.001)), tmp_path / "first", layout=name)
    weights = Path(DIRECTORIES[name]) / "diffusion_pytorch_model.safetensors"
    assert NULL not in load_file(tmp_path / "first" / weights)
    moved = trained(run, tmp_path / "moved", UNTOLD, 0.1)
    if name == "pixart":
        convert(str(moved), tmp_path / "second", layout=name)
        expected = load(moved).variables["params"]["prior"]["untold"]["features"]
        np.testing.assert_array_equal(load_file(tmp_path / "second" / weights)[NULL], expected)
        return
    bias = "prior/text/network/transformer/final_norm/bias"
    for other in (moved, trained(run, tmp_path / "encoder", bias, 0.5)):
        with pytest.raises(UserError, match=rf"{UNTOLD} .* layout {name} has no place for it: freeze") as refusal:
            convert(str(other), tmp_path / "second", layout=name)
        assert "\n" not in str(refusal.value) and not (tmp_path / "second").exists()


def test_the_empty_caption_needs_a_tokenizer():
    with pytest.raises(UserError, match=r"there is no tokenizer for the empty one: bring its tokenizer\.json"):
        empty_caption(CONFIGS["pixart"], {}, None)


def test_a_caption_of_several_tokens_fills_all_places_alike():
    """Of an empty one that begins with a token, too: an attention sees each as often."""
    config = CONFIGS["pixart"]
    begins = replace(READER, bos_id=READER.eos_id - 1)
    encoder: Any = build(config.prior.text)
    variables = encoder.init(jax.random.key(0), {"tokens": begins.encode([""], 120)})
    found = empty_caption(config, {"prior": {"text": variables["params"]}}, begins)
    features, inside = encoder.text_features(variables, begins.encode([""], 120))
    assert np.sum(inside) == 2
    np.testing.assert_allclose(found, np.tile(features[0][:2], (60, 1)), atol=1e-5)


@pytest.mark.parametrize("converted", ["stable-diffusion"], indirect=True)
def test_a_converted_pipeline_draws_of_a_prompt(converted: tuple[str, Path, Path], tmp_path: Path):
    _, _, run = converted
    sampling = replace(load(run).experiment.sampling, steps=2)
    drawn = sample(run, Options(num=2, prompt=("the red circle",), sampling=sampling, out=tmp_path / "sheet.png"))
    assert isinstance(drawn, Path) and drawn.stat().st_size > 1000
