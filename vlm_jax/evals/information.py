"""What latents still tell of an image, beside its pixels: its label, the words of its captions, which captions it has.

Each is told by a linear probe (`probe`) of the latents' mean, of the pixels, and of the pixels of the reconstruction,
which learns from training images and is measured on held-out ones. What is told less well by latents than by pixels is
not all lost: it is lost to linear reading. An encoder may also lay open what pixels hide: then the loss is below 0.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from vlm_jax.contract import Batch, Input, Variables
from vlm_jax.errors import UserError
from vlm_jax.evals.cider import words
from vlm_jax.evals.features import Features, reader, turned
from vlm_jax.evals.judge import Judge, by_each
from vlm_jax.evals.likelihood import ratio_and_error
from vlm_jax.evals.probe import multinomial, ridge
from vlm_jax.evals.retrieval import RANKS, alike, chance, gallery, recall_at, texts_of
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.evals.writing import Metrics

IMAGES = 4096
"""At most, of training and of the split: the first of each."""
WORDS = 127
"""Of captions, those that are most frequent in training; all others are one more."""
VIEWS = ("latents", "pixels", "reconstructions")
"""What probes are shown of an image; the last of a model that decodes."""


class Shown(NamedTuple):
    """Images of a split in order, as probes are shown them."""

    contents: list[bytes]
    """The same for images that are equal."""
    records: list[Mapping[str, Any]]
    """Of each its strings."""
    views: dict[str, Float[np.ndarray, "N D"]]
    """Of each of `VIEWS` a row of features for each image."""


def run(subject: Subject) -> Metrics:
    """Where all images have labels, of the label: how often the likeliest is right, and nats of the true one. Where all
    have captions, of each of their words: nats, each drawn on its own given the image. Beside them what is told without
    looking (`chance`), and of the nats, image by image, how many more they are than by pixels (`lost`). Where judges
    read the captions besides: how often an image's is among those nearest to where the probe takes it for.

    The images to learn from are of the same data set. Those that are in the split, too, are left out.
    """
    assert subject.records is not None and subject.lessons is not None
    look = onlooker(subject)
    held_out = shown(look, subject.batches, subject.records)
    training = shown(look, subject.lessons.batches, subject.lessons.records, frozenset(held_out.contents))
    found: Metrics = {"images": float(len(held_out.records)), "training_images": float(len(training.records))}
    if len(training.records) < 2:
        return found
    views = {name: turned(rows, held_out.views[name]) for name, rows in training.views.items()}
    if labels := both(training, held_out, "label"):
        found |= of_labels(views, *labels)
    if captions := both(training, held_out, "captions"):
        found |= of_words(views, *captions)
        ids = alike(held_out.contents)
        found |= by_each(subject.judges or (), lambda judge: of_captions(judge, views, *captions, ids))
    return found


def both(training: Shown, held_out: Shown, key: str) -> tuple[list[Any], list[Any]] | None:
    """What the records of both have by a key; None: one has nothing."""
    one, other = ([record.get(key) for record in each.records] for each in (training, held_out))
    return None if any(value in (None, ()) for value in (*one, *other)) else (one, other)


def onlooker(subject: Subject) -> Callable[[jax.Array], dict[str, Float[np.ndarray, "B D"]]]:
    """What shows images to probes: for each of `VIEWS` rows of features.

    Raises:
      UserError: when called, where the model makes of an image what is no number.
    """
    model = subject.model
    encode, decode, image, latents = model.encode, model.decode, model.inputs["image"], model.latents
    assert encode is not None and latents is not None
    seed = np.asarray(jax.random.key_data(subject.key)).tolist()
    alone = isinstance(latents, Input)
    read = reader({"": latents} if isinstance(latents, Input) else latents, seed)
    read_pixels = reader({"": image._replace(dtype="float32", limit=None)}, seed)

    @jax.jit
    def copied(variables: Variables, image: jax.Array) -> tuple[Any, jax.Array | None]:
        made = encode(variables, image)
        return made, None if decode is None else decode(variables, made)

    def look(image: jax.Array) -> dict[str, Float[np.ndarray, "B D"]]:
        made, copies = jax.tree.map(np.asarray, copied(subject.variables, image))
        rows = {"latents": read({"": made} if alone else made), "pixels": read_pixels({"": np.asarray(image)})}
        if not np.isfinite(rows["latents"]).all():
            raise UserError("the model encodes images as what is no number: evaluate another --checkpoint-step")
        return rows if copies is None else {**rows, "reconstructions": read_pixels({"": copies})}

    return look


def shown(
    look: Callable[[jax.Array], dict[str, Float[np.ndarray, "B D"]]],
    batches: Callable[[], Iterator[tuple[Batch, int]]],
    records: Callable[[], Iterable[Mapping[str, Any]]],
    without: Collection[bytes] = (),
) -> Shown:
    """The first `IMAGES` of a split, those left out whose contents are among `without`."""
    found, parts, strings = Shown([], [], {}), defaultdict[str, list[np.ndarray]](list), iter(records())
    for batch, valid in batches():
        contents = [hashlib.sha256(image.tobytes()).digest() for image in np.asarray(batch["image"])[:valid]]
        told = list(itertools.islice(strings, valid))
        new = [row for row, each in enumerate(contents) if each not in without][: IMAGES - len(found.records)]
        found.contents.extend(contents[row] for row in new)
        found.records.extend(told[row] for row in new)
        for name, rows in look(batch["image"]).items():
            parts[name].append(rows[new])
        if len(found.records) == IMAGES:
            break
    found.views.update({name: np.concatenate(rows) for name, rows in parts.items()})
    return found


def of_labels(views: Mapping[str, Features], training: Sequence[str], held_out: Sequence[str]) -> Metrics:
    """Accuracy and nats."""
    names = sorted(set(training))
    learned, asked = (counts_of(names, ([label] for label in each)) for each in (training, held_out))
    log_probs = told(views, learned, asked)
    found: Metrics = {}
    for name, each in log_probs.items():
        right = each.argmax(axis=1) == asked.argmax(axis=1)
        accuracy, error = ratio_and_error(right.astype(float), np.ones(len(right)))
        found |= {f"label_accuracy_{name}": accuracy, f"label_accuracy_{name}_standard_error": error}
    return found | nats_of("label", log_probs, asked)


def of_words(
    views: Mapping[str, Features], training: Sequence[Sequence[str]], held_out: Sequence[Sequence[str]]
) -> Metrics:
    """Nats a word, of all captions of an image; of captions without words, nothing is defined."""
    said, sought = ([[word for text in each for word in words(text)] for each in part] for part in (training, held_out))
    often = Counter(word for each in said for word in each)
    names = sorted(often, key=lambda word: (-often[word], word))[:WORDS]
    learned, asked = counts_of(names, said), counts_of(names, sought)
    return nats_of("word", told(views, learned, asked), asked) if asked.any() else {}


def counts_of(names: Sequence[str], said: Iterable[Iterable[str]]) -> Float[np.ndarray, "N V"]:
    """How often each name is said, and, last, any other."""
    columns = {name: column for column, name in enumerate(names)}
    rows = [[columns.get(each, len(names)) for each in row] for row in said]
    return np.stack([np.bincount(np.array(row, int), minlength=len(names) + 1) for row in rows]).astype(float)


def told(
    views: Mapping[str, Features], learned: Float[np.ndarray, "N V"], asked: Float[np.ndarray, "M V"]
) -> dict[str, Float[np.ndarray, "M V"]]:
    """log p of each name by the probe of each view, and by one that is shown nothing: in the words of metrics."""
    pixels = views["pixels"]
    blind = Features(pixels.training[:, :0], pixels.held_out[:, :0], pixels.variances[:0])
    return {
        name: multinomial(shown.training, shown.variances, learned).log_probs(shown.held_out)
        for name, shown in {**{f"of_{view}": each for view, each in views.items()}, "chance": blind}.items()
    }


def nats_of(what: str, log_probs: Mapping[str, Float[np.ndarray, "M V"]], asked: Float[np.ndarray, "M V"]) -> Metrics:
    """Nats for each that is asked, how many more they are than by pixels, and the standard errors over images."""
    nats = {name: -np.sum(asked * each, axis=1) for name, each in log_probs.items()}
    lost = {f"lost_by_{view}": nats[f"of_{view}"] - nats["of_pixels"] for view in VIEWS if f"of_{view}" in nats}
    del lost["lost_by_pixels"]
    found: Metrics = {}
    for name, each in (nats | lost).items():
        mean, error = ratio_and_error(each, asked.sum(axis=1))
        found |= {f"{what}_nats_{name}": mean, f"{what}_nats_{name}_standard_error": error}
    return found


def of_captions(
    judge: Judge,
    views: Mapping[str, Features],
    training: Sequence[Sequence[str]],
    held_out: Sequence[Sequence[str]],
    ids: Int[np.ndarray, " M"],
) -> Metrics:
    """How often one of an image's captions is among the `RANKS` nearest to where a probe takes it for, by their cosine.

    The probe is linear regression on the mean of what the judge makes of an image's captions. Of all the mean of
    training's is taken away: else captions that are like the most would be near to every image. Of features that tell
    nothing all captions are as near, which counts as not found.
    """
    if not judge.reads:
        return {f"caption_recall@{k}_{of}": None for k in RANKS for of in (*(f"of_{view}" for view in views), "chance")}
    texts, belongs = gallery(judge, held_out, ids)
    read = texts_of(judge, [text for each in training for text in each]).vectors.astype(np.float64)
    starts = np.cumsum([0, *(len(each) for each in training[:-1])])
    aims = np.add.reduceat(read, starts) / np.array([[len(each)] for each in training])
    centre = aims.mean(axis=0)
    captions = texts.vectors - centre
    captions /= np.maximum(np.linalg.norm(captions, axis=1, keepdims=True), 1e-12)
    found: Metrics = {f"caption_recall@{k}_chance": chance(belongs, k) for k in RANKS}
    for view, features in views.items():
        # An image's own length changes nothing about which caption is nearest to it.
        similarity = features.held_out @ ridge(features.training, features.variances, aims) @ captions.T
        found |= {f"caption_recall@{k}_of_{view}": recall_at(similarity, belongs, k) for k in RANKS}
    return found


EVALUATION = Evaluation("information", ("encode",), run, given=("records", "lessons"), if_given=("judges",))
