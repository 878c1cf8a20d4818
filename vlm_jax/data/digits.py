"""The `digits` data set: small handwritten digits, for exact likelihoods."""

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_IMAGES = 360
VALIDATION_IMAGES = 180


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 handwritten digits, 8x8 pixels of 17 levels: uint8 with the values 0 to 16, as scikit-learn has them.

    (UCI ML hand-written digits, Kaynak 1995, through `sklearn.datasets.load_digits`.) No two of its images are equal.

    The images are ranked by the SHA-256 of their pixels, which is a fixed random order: `test` has the first 360,
    `validation` the next 180, `train` the other 1,257.
    """

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=Digits.__doc__,
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            license="CC BY 4.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        from sklearn.datasets import load_digits  # a second to import, and needed only here

        digits = load_digits()
        images = digits.images.astype(np.uint8)
        ranked = sorted(range(len(images)), key=lambda index: hashlib.sha256(images[index].tobytes()).digest())
        first_train = TEST_IMAGES + VALIDATION_IMAGES
        return {
            split: self._generate_examples(images, digits.target, indices)
            for split, indices in (
                ("train", ranked[first_train:]),
                ("validation", ranked[TEST_IMAGES:first_train]),
                ("test", ranked[:TEST_IMAGES]),
            )
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: list[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices:
            png = io.BytesIO()
            Image.fromarray(images[index]).save(png, "png")
            yield index, {"image": png.getvalue(), "label": int(labels[index])}
