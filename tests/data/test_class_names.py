"""Classes in words: whatever TFDS allows for a label and its names is read or refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tools.evaluate import evaluate, name_classes
from vlm_jax.data import class_names, open_source, read_class_names
from vlm_jax.data.class_names import imagenet_names, imagenet_prompts
from vlm_jax.errors import UserError
from vlm_jax.experiment import ZeroShot

ClassLabel = tfds.features.ClassLabel


def prepare(data_dir: Path, labels: dict[str, ClassLabel], values: dict[str, list[Any]]) -> None:
    """A data set called `kinds` of grey images with these labels."""
    encoded = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(encoded, "png")

    class Kinds(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # each call makes another
        name = "kinds"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = {"image": tfds.features.Image(shape=(4, 4, 1)), **labels}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"test": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for index, row in enumerate(zip(*values.values(), strict=True)):
                yield index, {"image": encoded.getvalue(), **dict(zip(values, row, strict=True))}

    Kinds(data_dir=data_dir).download_and_prepare(file_format="array_record")


def test_names_become_words() -> None:
    assert class_names(["maple_tree", "aquarium fish", "b"]) == ("maple tree", "aquarium fish", "b")
    assert class_names(["n02085620-japanese_spaniel"]) == ("japanese spaniel",)


def test_wordnet_codes_have_the_names_of_clip_wherever_they_stand() -> None:
    assert class_names(["n02012849", "n01440764"]) == ("crane bird", "tench")
    assert len(imagenet_names()) == 1000
    # TFDS has the 1,000 codes in their own order, which is that of the labels.
    assert class_names(sorted(imagenet_names())) == tuple(imagenet_names().values())
    assert list(imagenet_names().items())[-1] == ("n15075141", "toilet paper")


def test_clip_describes_a_class_of_imagenet_in_80_ways() -> None:
    assert len(set(imagenet_prompts())) == 80 and all(prompt.count("{}") == 1 for prompt in imagenet_prompts())
    assert "a photo of a {}." in imagenet_prompts() and imagenet_prompts()[-1] == "a tattoo of the {}."


@pytest.mark.parametrize("label", ["3", "10", "n99999999", "_"])
def test_codes_and_numbers_are_refused(label: str) -> None:
    with pytest.raises(
        UserError, match=rf"the class '{label}' is a code .*: give the 2 names by --zero-shot-names FILE"
    ):
        class_names(["cat", label])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "nought\n one \n\n"),
        ("names.json", '["nought", "one"]'),
        ("names.json", '{"1": "one", "0": "nought"}'),
    ],
)
def test_names_come_from_a_file(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    assert read_class_names(tmp_path / file, ["0", "1"]) == ("nought", "one")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("names.txt", b"one\n", "holds 1 names and there are 2 classes"),
        ("names.txt", b"\nb\n", "has no name for the class '0'"),
        ("names.txt", b"\xff\n", "cannot be read"),
        ("names.json", b"[", "cannot be read"),
        ("names.json", b"[" * 100_000, r"cannot be read \(it is nested too deep\)"),
        ("names.json", b"3", "holds no list of names"),
        ("names.json", b"[1, 2]", "has no name for the class '0'"),
        ("names.json", b'{"0": "nought"}', "has no name for the class '1'"),
        ("absent", None, "cannot be read \\(No such file or directory\\)"),
    ],
)
def test_a_file_that_does_not_name_each_class_is_refused(
    tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_class_names(tmp_path / file, ["0", "1"])


def test_of_several_labels_none_is_taken_unless_one_is_called_so(tmp_path: Path) -> None:
    labels = {"age": ClassLabel(names=["young", "old"]), "kind": ClassLabel(names=["cat", "dog", "hen"])}
    prepare(tmp_path, labels, {"age": [1, 0], "kind": [2, 0]})
    source = open_source("kinds", "test", tmp_path)
    assert source.label_names is None and "label" not in source[0]
    with pytest.raises(UserError, match="kinds has several labels: choose one of age, kind for --zero-shot-label"):
        name_classes(source, ZeroShot(name="kinds"))
    chosen = open_source("kinds", "test", tmp_path, label="kind")
    assert name_classes(chosen, ZeroShot(name="kinds")) == ("cat", "dog", "hen")
    assert sorted(record["label"] for record in chosen) == [0, 2]
    with pytest.raises(UserError, match="kinds has no label 'image': choose among age, kind"):
        open_source("kinds", "test", tmp_path, label="image")


def test_the_one_called_label_is_taken_before_coarser_ones(tmp_path: Path) -> None:
    labels = {"coarse_label": ClassLabel(names=["pet"]), "label": ClassLabel(names=["cat", "dog"])}
    prepare(tmp_path, labels, {"coarse_label": [0], "label": [1]})
    assert open_source("kinds", "test", tmp_path).label_names == ("cat", "dog")
    assert open_source("kinds", "test", tmp_path, label="coarse_label").label_names == ("pet",)


def test_classes_that_are_only_counted_need_names(tmp_path: Path) -> None:
    prepare(tmp_path, {"label": ClassLabel(num_classes=2)}, {"label": [1]})
    source = open_source("kinds", "test", tmp_path)
    with pytest.raises(UserError, match="the class '0' is a code and not a name"):
        name_classes(source, ZeroShot(name="kinds"))
    (tmp_path / "names").write_text("cat\ndog\n")
    assert name_classes(source, ZeroShot(name="kinds", names=str(tmp_path / "names"))) == ("cat", "dog")


def test_a_label_of_no_known_number_of_classes_is_none(tmp_path: Path) -> None:
    prepare(tmp_path, {"label": ClassLabel(num_classes=2)}, {"label": [1]})
    description = next(tmp_path.rglob("features.json"))
    features = json.loads(description.read_text())
    features["featuresDict"]["features"]["label"]["classLabel"] = {}
    description.write_text(json.dumps(features))
    with pytest.raises(UserError, match="kinds has no labels to classify"):
        name_classes(open_source("kinds", "test", tmp_path), ZeroShot(name="kinds"))


def test_an_example_whose_class_is_not_told_is_refused(clip_run: Path, data_dir: Path, tmp_path: Path) -> None:
    """As in the test splits of competitions, where TFDS has -1."""
    (tmp_path / "openmoji").symlink_to(data_dir / "openmoji")
    prepare(tmp_path, {"label": ClassLabel(names=["cat", "dog"])}, {"label": [1, -1]})
    with pytest.raises(UserError, match=r"'label' holds the value -1, outside \[0, 2\)"):
        evaluate(clip_run, zero_shot="kinds", data_dir=str(tmp_path), only=("zero_shot",), out=tmp_path / "eval.json")
