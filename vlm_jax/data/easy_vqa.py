"""The `easy_vqa` data set: one coloured shape an image, and questions about it with one-word answers.

From the PyPI package `easy-vqa` (https://github.com/vzhou842/easy-VQA, MIT licence).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import easy_vqa
import tensorflow_datasets as tfds
from tqdm import tqdm

Questions = tuple[list[str], list[str], list[int]]
"""Each question, its answer and the number of its image, as the package gives them."""

TURNS = 3
"""Of a dialogue, at most."""
LABELS = {
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "shape": ("circle", "rectangle", "triangle"),
}


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """5,000 images, 64x64 RGB, with 48,248 questions; no image is in both of its own splits.

    Configurations:
      `questions` (the default): one record a question (38,575 train, 9,673 test), with `image`, `question` such as
        "what color is the triangle?" and `answer`, one of 13 words.
      `dialogues`: one record for up to three questions of one image, with `image` and `turns`, each of a `question` and
        its `answer`.
      `captions`: one record an image of which both are asserted (3,542 train, 880 test), with `image` and the one of
        `captions`, such as "a teal circle".
      `color`, `shape`: one record an image, with `image` and its `label`. The package gives no labels; they are
        what the questions and answers assert ("what is the red shape?", "triangle"; "is there no circle?", "no").
        Images that nothing is asserted of are left out, which leaves of 4,000 and 1,000 images 3,710 train and
        920 test with a colour, 3,793 and 944 with a shape.
    """

    name = "easy_vqa"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own declaration)
        tfds.core.BuilderConfig(name="questions", description="One record a question"),
        tfds.core.BuilderConfig(name="dialogues", description="Up to three questions of an image a record"),
        tfds.core.BuilderConfig(name="captions", description="One record an image, with its colour and shape in words"),
        tfds.core.BuilderConfig(name="color", description="One record an image, labelled with its colour"),
        tfds.core.BuilderConfig(name="shape", description="One record an image, labelled with its shape"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {"image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png")}
        config = self.builder_config.name
        turn = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
        if config == "questions":
            features |= turn
        elif config == "dialogues":
            features |= {"turns": tfds.features.Sequence(turn)}
        elif config == "captions":
            features |= {"captions": tfds.features.Sequence(tfds.features.Text())}
        else:
            features |= {"label": tfds.features.ClassLabel(names=LABELS[config])}
        return tfds.core.DatasetInfo(
            builder=self,
            description=EasyVqa.__doc__,
            homepage="https://github.com/vzhou842/easy-VQA",
            license="MIT",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {
            "train": self._generate_examples(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
            "test": self._generate_examples(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
        }

    def _generate_examples(
        self, questions: Questions, paths: Mapping[int, str]
    ) -> Iterator[tuple[int | str, dict[str, Any]]]:
        config = self.builder_config.name
        if config == "questions":
            records = enumerate(zip(*questions, strict=True))
            progress = tqdm(records, total=len(questions[0]), desc="Preparing easy_vqa", unit=" questions", leave=False)
            for key, (question, answer, image) in progress:
                yield key, {"image": Path(paths[image]).read_bytes(), "question": question, "answer": answer}
        elif config == "dialogues":
            turns = defaultdict(list)
            for question, answer, image in zip(*questions, strict=True):
                turns[image].append({"question": question, "answer": answer})
            for image, said in turns.items():
                for start in range(0, len(said), TURNS):
                    part = said[start : start + TURNS]
                    yield f"{image}_{start}", {"image": Path(paths[image]).read_bytes(), "turns": part}
        elif config == "captions":
            for image, (color, shape) in things(questions).items():
                yield image, {"image": Path(paths[image]).read_bytes(), "captions": [f"a {color} {shape}"]}
        else:
            for image, label in _labels(questions, LABELS[config]).items():
                yield image, {"image": Path(paths[image]).read_bytes(), "label": label}


def things(questions: Questions) -> dict[int, tuple[str, str]]:
    """Colour and shape of what is in each image of which both are asserted."""
    colors, shapes = (_labels(questions, LABELS[name]) for name in ("color", "shape"))
    return {image: (color, shapes[image]) for image, color in colors.items() if image in shapes}


def _labels(questions: Questions, names: tuple[str, ...]) -> dict[int, str]:
    """The name that the questions and answers assert of each image, for the images where they do."""
    asserted: defaultdict[int, set[str]] = defaultdict(set)
    for question, answer, image in zip(*questions, strict=True):
        words = question.rstrip("?").split()
        negated = "no" in words or "not" in words
        if answer not in ("yes", "no"):
            asserted[image] |= {*words, answer} & set(names)
        elif (answer == "yes") != negated:
            asserted[image] |= set(words) & set(names)
    labels = {}
    for image, found in asserted.items():
        if found:
            (labels[image],) = found  # refuses two names of one image; there are none
    return labels
