"""The tools on what is not the run's own: another data set, and judges."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image as PillowImage
from safetensors.numpy import save_file

import vlm_jax
from inceptions import arrays_of, random_params
from made import build as prepare
from tools import judging
from tools.convert import convert
from tools.data import OtherData, choose_data
from tools.evaluate import evaluate, results_name
from tools.judging import image_of, load_judges, names_of, pictures_of
from tools.sample import Options, sample
from vlm_jax.contract import Input
from vlm_jax.data import Data, Image, open_data, open_source, open_training_data
from vlm_jax.errors import UserError
from vlm_jax.experiment import from_record, to_record
from vlm_jax.models import build, inception
from vlm_jax.sharding import MeshShape, make_mesh


def pixels(path: Path) -> np.ndarray:
    with PillowImage.open(path) as image:
        return np.asarray(image)


def test_another_data_set_s_results_have_a_file_of_their_own(vae_run: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(vae_run, tmp_path / "run")
    (workdir / "eval.json").write_text("the run's own")
    data = OtherData(name="digits:1.0.0")
    results = evaluate(workdir, data, split="train[:40]", only=("reconstruction",))
    assert (results["data"], results["examples"]) == ("digits:1.0.0", 40)
    assert json.loads((workdir / "eval-digits:1.0.0-train[:40].json").read_text()) == results
    assert (workdir / "eval.json").read_text() == "the run's own"
    assert results_name("easy_vqa/color", "test") == "eval-easy_vqa-color-test.json"


def test_another_data_set_needs_what_the_model_reads(clip_run: Path) -> None:
    with pytest.raises(UserError, match="the model reads 'tokens', which is made of text, and digits has image, label"):
        evaluate(clip_run, OtherData(name="digits"))


def test_a_run_without_data_asks_for_them(vae_run: Path, data_dir: Path) -> None:
    """As that of a model which was trained elsewhere, whose images are made as they were there."""
    loaded = vlm_jax.load(vae_run)
    squashed = Data(name=None, fields=(Image(resize="squash"),))
    foreign = replace(loaded, experiment=replace(loaded.experiment, data=squashed))
    assert from_record(to_record("vae-tiny", foreign.experiment, {})) == foreign.experiment
    for opened in (open_data, lambda data, split, *rest: open_training_data(data, *rest)):
        with pytest.raises(UserError, match=r"trained on no data set that is known here: give --data\.name"):
            opened(choose_data(foreign, OtherData()), "test", loaded.model.inputs, data_dir)
    assert choose_data(foreign, OtherData(name="digits")) == replace(squashed, name="digits")
    assert choose_data(loaded, OtherData(name="openmoji")) == replace(loaded.experiment.data, name="openmoji")


@pytest.mark.slow
def test_probes_learn_from_the_other_data_set_where_it_has_something_to_learn_from(
    vae_run: Path, tmp_path: Path, data_dir: Path
) -> None:
    """From its own training split, whatever part of another the run was trained on."""
    loaded = vlm_jax.load(vae_run)
    part = replace(loaded, experiment=replace(loaded.experiment, data=Data(name="digits", train="train[:5]")))
    assert choose_data(part, OtherData(name="openmoji")).train == "train"
    assert choose_data(part, OtherData()).train == "train[:5]"
    features = {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(names=["a", "b"])}
    png = io.BytesIO()
    PillowImage.new("L", (8, 8), 7).save(png, "png")
    made = prepare(tmp_path, features, *[{"image": png.getvalue(), "label": 0}] * 6, split="test")
    options: dict[str, Any] = {"data_dir": str(made), "out": tmp_path / "eval.json"}
    results = evaluate(vae_run, OtherData(name="made"), **options)
    assert "reconstruction/psnr" in results and not any("information" in name for name in results)
    with pytest.raises(UserError, match="nothing for the evaluation information to measure"):
        evaluate(vae_run, OtherData(name="made"), **options, only=("information",))


def test_what_is_shown_may_be_of_another_data_set(vae_run: Path, clip_run: Path, tmp_path: Path) -> None:
    own, other = (
        sample(vae_run, Options(num=4, split="test", data=OtherData(name=name), out=tmp_path / f"{index}.png"))
        for index, name in enumerate((None, "digits:1.0.0"))
    )
    np.testing.assert_array_equal(pixels(own), pixels(other))
    with pytest.raises(UserError, match="the model reads 'tokens', which is made of text, and digits has image, label"):
        sample(clip_run, Options(data=OtherData(name="digits"), out=tmp_path / "none.png"))


def test_samples_are_measured_by_a_judge(vae_run: Path, clip_run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"split": "test[:40]", "batch_size": 16, "out": tmp_path / "eval.json"}
    results = evaluate(vae_run, **options, judge=(clip_run,), only=("frechet",))
    assert results["frechet/samples"] == 40 and 0 < results["frechet/distance_of_embeddings"] < 4
    assert results["frechet_judge"] == str(clip_run)
    assert not any("frechet" in name for name in evaluate(vae_run, **options, only=("reconstruction",)))
    with pytest.raises(UserError, match="holds a model that does not embed images: give another --judge"):
        evaluate(vae_run, **options, judge=(vae_run,))
    with pytest.raises(UserError, match="nothing for the evaluation frechet to measure"):
        evaluate(vae_run, **options, only=("frechet",))


def test_several_judges_have_metrics_of_their_own_names(vae_run: Path, clip_run: Path, tmp_path: Path) -> None:
    """And what was measured before by one is gone from the file, which names the judges of what it holds."""
    options: dict[str, Any] = {"split": "test[:40]", "batch_size": 16, "out": tmp_path / "eval.json"}
    alone = evaluate(vae_run, **options, judge=(clip_run,), only=("frechet",))
    other = shutil.copytree(clip_run, tmp_path / "other")
    evaluate(vae_run, **options, judge=(clip_run, other), only=("frechet",))
    kept = json.loads((tmp_path / "eval.json").read_text())
    distances = {name: value for name, value in kept.items() if "distance" in name}
    one = alone["frechet/distance_of_embeddings"]
    expected = {f"frechet/distance_of_embeddings_by_{name}": pytest.approx(one) for name in ("run", "other")}
    assert distances == expected and kept["frechet_judge"] == f"{clip_run}, {other}"


def test_judges_are_called_by_as_much_of_their_directories_as_tells_them_apart(tmp_path: Path) -> None:
    assert names_of([Path("runs/a"), Path("runs/b/")]) == ["a", "b"]
    assert names_of([tmp_path / "x/run", tmp_path / "y/run", tmp_path / "b"]) == [
        "x-run",
        "y-run",
        f"{tmp_path.name}-b",
    ]
    assert names_of([]) == [] and names_of([Path("/")]) == [""]
    with pytest.raises(UserError, match=r"--judge names .*/a twice: give it once"):
        names_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_pictures_are_as_the_model_reads_or_draws_them(vae_run: Path, data_dir: Path) -> None:
    """Of the split and of the training data, in order; of a model that reads latents as large as it draws them."""
    loaded = vlm_jax.load(vae_run)
    data, spec = loaded.experiment.data, loaded.model.inputs["image"]
    source = open_data(data, "test[:5]", loaded.model.inputs, data_dir)
    pictures = pictures_of(loaded, source, data, data_dir, 2)
    shown = list(pictures.held_out())
    assert [len(images) for images in shown] == [2, 2, 1] and pictures.levels == spec.limit == 17
    expected = [source[index]["image"].pixels(1) for index in range(5)]
    np.testing.assert_array_equal(np.concatenate(shown), expected)
    first = next(pictures.training())
    assert first[0] == next(open_source("digits", data.train, data_dir).strings())
    np.testing.assert_array_equal(first[1], open_source("digits", data.train, data_dir)[0]["image"].pixels(1))
    inputs = {"latent": Input((2, 2, 1), "float32")}
    latent = replace(loaded, model=replace(loaded.model, inputs=inputs, encode=None, decode=None))
    assert image_of(latent) == spec._replace(limit=256)
    assert image_of(replace(latent, model=replace(latent.model, sample=None))) is None


@pytest.mark.slow
def test_the_network_of_fid_judges_images_of_the_size_that_they_have(
    vae_run: Path, clip_run: Path, tmp_path: Path
) -> None:
    """It scales them itself. One of other sizes than published measures no FID, whatever its weights."""
    config = inception.Config(width=2, classes=None)
    save_file(arrays_of(config, random_params(config)), tmp_path / "weights.safetensors")
    convert(str(tmp_path / "weights.safetensors"), tmp_path / "inception")
    mesh = make_mesh(MeshShape())
    shown = image_of(vlm_jax.load(vae_run))
    with jax.set_mesh(mesh):
        alone, _ = judges = load_judges((tmp_path / "inception", clip_run), mesh, shown)
    assert alone.model.inputs["image"].shape == (8, 8, 3) and not any(judge.fid for judge in judges)
    options: dict[str, Any] = {"split": "test[:8]", "batch_size": 8, "out": tmp_path / "eval.json"}
    results = evaluate(vae_run, **options, judge=(tmp_path / "inception", clip_run), only=("frechet", "kid"))
    names = {name.partition("/")[2] for name in results if "/" in name and "distance" in name}
    assert names == {"distance_of_features_by_inception", "distance_of_embeddings_by_run"}
    assert results["kid/subset_size"] == 4 and "kid/kid_of_features_deviation_by_inception" in results
    assert results["kid_judge"] == f"{tmp_path / 'inception'}, {clip_run}"


def test_the_published_network_measures_fid(vae_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = vlm_jax.load(vae_run)
    for config, measures in ((inception.Config(), True), (inception.Config(width=2), False)):
        other = replace(loaded, model=build(config), experiment=replace(loaded.experiment, model=config), variables={})
        monkeypatch.setattr(judging, "load", lambda *_, other=other, **__: other)
        (found,) = load_judges((vae_run,), make_mesh(MeshShape()), Input((32, 32, 1), "uint8", 17))
        assert found.fid == measures and found.model.inputs["image"] == Input((32, 32, 3), "uint8", 256)
