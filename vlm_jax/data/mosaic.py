"""The `mosaic` data set: four of `easy_vqa`'s pictures in one, and questions that nothing but the image answers."""

import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from tqdm import tqdm

from vlm_jax.data.easy_vqa import LABELS, TURNS, Questions, things

COLORS, SHAPES = LABELS["color"], LABELS["shape"]
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZE = 64
DRAWS = 4096
"""Mosaics that are drawn at a time, of which the first that fits is taken."""

Things = Int[np.ndarray, "N 4"]
"""What lies at each of the places of N mosaics: colour times the number of shapes, plus shape."""
Part = Callable[[Things], Things]
"""What of a thing is asked for."""


class Asked(NamedTuple):
    """A question with one of its answers."""

    question: str
    answer: str
    fits: Callable[[Things], Bool[np.ndarray, " N"]]
    """Of which mosaics that is the answer."""


def colors(places: Things) -> Things:
    return places // len(SHAPES)


def shapes(places: Things) -> Things:
    return places % len(SHAPES)


def color_of_place() -> Iterator[Asked]:
    for place, where in enumerate(PLACES):
        for color, name in enumerate(COLORS):
            yield Asked(f"what color is the {where} shape?", name, partial(lies_at, colors, place, color))


def shape_of_place() -> Iterator[Asked]:
    for place, where in enumerate(PLACES):
        for shape, name in enumerate(SHAPES):
            yield Asked(f"what is the {where} shape?", name, partial(lies_at, shapes, place, shape))


def number() -> Iterator[Asked]:
    for count in range(len(PLACES) + 1):
        for color, name in enumerate(COLORS):
            yield Asked(f"how many {name} shapes are there?", str(count), partial(times, colors, color, count))
        for shape, name in enumerate(SHAPES):
            yield Asked(f"how many {name}s are there?", str(count), partial(times, shapes, shape, count))


def presence() -> Iterator[Asked]:
    for thing in range(len(COLORS) * len(SHAPES)):
        text = f"is there a {COLORS[thing // len(SHAPES)]} {SHAPES[thing % len(SHAPES)]}?"
        yield Asked(text, "yes", partial(is_there, thing))
        yield Asked(text, "no", partial(times, np.asarray, thing, 0))


def relation() -> Iterator[Asked]:
    """Of two colours that are there once each, on either side."""
    for which, axis in (("left of", 1), ("above", 0)):
        for one, other in itertools.permutations(range(len(COLORS)), 2):
            text = f"is the {COLORS[one]} shape {which} the {COLORS[other]} one?"
            yield Asked(text, "yes", partial(lies_before, axis, one, other))
            yield Asked(text, "no", partial(lies_before, axis, other, one))


def is_there(thing: int, found: Things) -> Bool[np.ndarray, " N"]:
    return (found == thing).any(axis=1)


def lies_at(of: Part, place: int, value: int, found: Things) -> Bool[np.ndarray, " N"]:
    return of(found)[:, place] == value


def times(of: Part, value: int, count: int, found: Things) -> Bool[np.ndarray, " N"]:
    return (of(found) == value).sum(axis=1) == count


def lies_before(axis: int, one: int, other: int, found: Things) -> Bool[np.ndarray, " N"]:
    """Both colours are there once, the one in the first column (of axis 1) or row (0), the other in the second."""
    first, second = ((colors(found) == color).reshape(-1, 2, 2) for color in (one, other))
    once = (first.sum(axis=(1, 2)) == 1) & (second.sum(axis=(1, 2)) == 1)
    return once & first.any(axis=2 - axis)[:, 0] & second.any(axis=2 - axis)[:, 1]


KINDS = {color_of_place: 10, shape_of_place: 34, number: 8, presence: 8, relation: 2}
"""How often the test split asks each question of a kind with each of its answers; the training split ten times that."""
CHANCE = {color_of_place: 1 / 8, shape_of_place: 1 / 3, number: 1 / 5, presence: 1 / 2, relation: 1 / 2}
"""What the best guess without the image scores, for all answers to a question are equally frequent: in all 34%."""


class Mosaic(tfds.core.GeneratorBasedBuilder):
    """20,000 and 2,000 pictures 64x64 RGB, each of four of `easy_vqa`'s at half their size, with a question each.

    | kind | question | answers | test | chance |
    |---|---|---|---|---|
    | colour | what color is the top left shape? | 8 | 320 | 1/8 |
    | shape | what is the bottom right shape? | 3 | 408 | 1/3 |
    | number | how many circles are there? how many red shapes are there? | 0 to 4 | 440 | 1/5 |
    | presence | is there a teal circle? | yes, no | 384 | 1/2 |
    | relation | is the red shape left of the blue one? is the red shape above the blue one? | yes, no | 448 | 1/2 |

    Every question is asked as often with each of its answers, so that of the answers alone nothing can be learned: the
    best guess without the image is right in 34% of all. Each question has a mosaic of its own, drawn at random from
    those of which the answer is true. Pictures of the train split are in `train` only; `train` has ten times as many
    questions of each kind as `test`.

    Configurations:
      `questions` (the default): as above, with `image`, `question` and `answer`.
      `dialogues`: 20,000 and 500 other mosaics of things drawn at random, with `image` and three `turns` each, every
        one a question of another kind and its answer. They are not balanced, and are there to be trained on.
      `captions`: as many others, with `image` and the one of `captions`, "a red circle, a blue triangle, a teal circle,
        a red rectangle": what lies at each place, in reading order.
    """

    name = "mosaic"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS's own declaration)
        tfds.core.BuilderConfig(name="questions", description="One question a mosaic, in balance"),
        tfds.core.BuilderConfig(name="dialogues", description="Three questions a mosaic"),
        tfds.core.BuilderConfig(name="captions", description="What lies at each place of a mosaic, in words"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        turn: dict[str, Any] = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
        told = {
            "questions": turn,
            "dialogues": {"turns": tfds.features.Sequence(turn)},
            "captions": {"captions": tfds.features.Sequence(tfds.features.Text())},
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=Mosaic.__doc__,
            homepage="https://github.com/vzhou842/easy-VQA",
            license="MIT",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    **told[self.builder_config.name],
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {
            "train": self._generate_examples(0, easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths(), 10),
            "test": self._generate_examples(1, easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), 1),
        }

    def _generate_examples(
        self, seed: int, questions: Questions, paths: dict[int, str], repeats: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        pictures: defaultdict[int, list[int]] = defaultdict(list)
        for image, (color, shape) in sorted(things(questions).items()):
            pictures[COLORS.index(color) * len(SHAPES) + SHAPES.index(shape)].append(image)
        half = cache(lambda image: halved(Path(paths[image])))

        def drawing(found: Sequence[int], rng: np.random.Generator) -> bytes:
            return mosaic([half(int(rng.choice(pictures[thing]))) for thing in found])

        config = self.builder_config.name
        if config != "questions":
            rng = np.random.default_rng([seed, 1 if config == "dialogues" else 2])
            found = rng.integers(len(COLORS) * len(SHAPES), size=(20_000 if repeats > 1 else 500, len(PLACES)))
            told = turns(found, rng) if config == "dialogues" else ([caption(each)] for each in found)
            field = "turns" if config == "dialogues" else "captions"
            for key, each in enumerate(tqdm(told, desc="Preparing mosaic", total=len(found), leave=False)):
                yield key, {"image": drawing(found[key].tolist(), rng), field: each}
            return
        asked = [each for kind, often in KINDS.items() for each in kind() for _ in range(often * repeats)]
        for key, each in enumerate(tqdm(asked, desc="Preparing mosaic", unit=" questions", leave=False)):
            rng = np.random.default_rng([seed, key])
            picture = drawing(drawn(each, rng), rng)
            yield key, {"image": picture, "question": each.question, "answer": each.answer}


def drawn(asked: Asked, rng: np.random.Generator) -> list[int]:
    """What lies at each place: four things, all equally likely, given that the answer is true of them."""
    while True:
        found = rng.integers(len(COLORS) * len(SHAPES), size=(DRAWS, len(PLACES)))
        fitting = np.flatnonzero(asked.fits(found))
        if len(fitting):
            return found[fitting[0]].tolist()


def turns(found: Things, rng: np.random.Generator) -> Iterator[list[dict[str, str]]]:
    """Of each mosaic questions of different kinds, with their answers.

    Of the questions of a kind one is drawn whose answer is yes as often as no; of the others any.
    """
    kinds = [list(kind()) for kind in KINDS]
    truths = [(asked, np.stack([each.fits(found) for each in asked], axis=1)) for asked in kinds]
    for index in range(len(found)):
        asked_of = []
        for chosen in rng.permutation(len(truths)):
            asked, true = truths[chosen]
            fitting = np.flatnonzero(true[index])
            yes = [each for each in fitting if asked[each].answer == "yes"]
            if yes:
                fitting = np.array(yes) if rng.random() < 0.5 else np.setdiff1d(fitting, yes)
            if len(fitting):
                each = asked[rng.choice(fitting)]
                asked_of.append({"question": each.question, "answer": each.answer})
        yield asked_of[:TURNS]


def caption(places: Int[np.ndarray, " 4"]) -> str:
    """What lies at each place, in their order: "a red circle, a blue triangle, a teal circle, a red rectangle"."""
    return ", ".join(f"a {COLORS[thing // len(SHAPES)]} {SHAPES[thing % len(SHAPES)]}" for thing in places)


def halved(path: Path) -> UInt8[np.ndarray, "32 32 3"]:
    """The picture, each 2x2 of its pixels averaged."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").reduce(2))


def mosaic(quarters: list[UInt8[np.ndarray, "32 32 3"]]) -> bytes:
    """Four pictures in the order of `PLACES`, as PNG."""
    one, two, three, four = quarters
    pixels = np.concatenate([np.concatenate([one, two], axis=1), np.concatenate([three, four], axis=1)], axis=0)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    return png.getvalue()
