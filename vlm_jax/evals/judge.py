"""A second model that looks at images, for evaluations of those that the first one makes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from vlm_jax.contract import Input, Model, Variables
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.data.transforms import resample, whole_box


@dataclass(frozen=True)
class Judge:
    """A model that has `embed_image`, or `image_features` alone, and what belongs to it."""

    model: Model
    variables: Variables
    tokenizer: Tokenizer | None = None
    name: str = "judge"
    """By which its results are told from those of others."""
    fid: bool = False
    """Whether it is the network of FID: distances in no other's eyes are called so."""

    @property
    def sees(self) -> Literal["embeddings", "features"]:
        """What its vectors of images are: of unit length, or where it has no such, means of the features of all parts
        of an image, which are as long as they are."""
        return "features" if self.model.embed_image is None else "embeddings"

    @property
    def reads(self) -> bool:
        """Whether it embeds texts too, so that it can say which of them an image shows."""
        return self.sees == "embeddings" and self.model.embed_text is not None and self.tokenizer is not None

    def embeddings(self, batches: Iterable[UInt8[np.ndarray, "B H W C"]], levels: int) -> Float[np.ndarray, "N D"]:
        """What it sees in images of any size, in grey or RGB, of values in `[0, levels)`.

        They are scaled as training's are, to the judge's size and range. The first batch is the largest.
        """
        see = self.model.embed_image if self.sees == "embeddings" else self.model.image_features
        return self._look(see, _means, batches, levels)

    def statistics(self, batches: Iterable[UInt8[np.ndarray, "B H W C"]], levels: int) -> Float[np.ndarray, "N K"]:
        """The mean, the largest and the standard deviation over all parts of an image of each of its features.

        They tell what is somewhere in an image, which embeddings that were learned of other images need not. Of a judge
        without features they are its embeddings. Images are as those of `embeddings`.
        """
        see = self.model.image_features or self.model.embed_image
        return self._look(see, _moments, batches, levels)

    def _look(
        self,
        see: Callable[..., jax.Array] | None,
        pooled: Callable[[jax.Array], jax.Array],
        batches: Iterable[UInt8[np.ndarray, "B H W C"]],
        levels: int,
    ) -> Float[np.ndarray, "N D"]:
        spec = self.model.inputs["image"]
        # Each level by that of its share of the whole range.
        scaled = np.round(np.arange(levels) * (((spec.limit or 256) - 1) / (levels - 1))).astype(np.uint8)
        vectors, together = [], 0
        for batch in batches:
            shown = np.stack([_shown(scaled[image], spec) for image in batch])
            together = max(together, len(shown))
            filled = np.pad(shown, ((0, together - len(shown)), *[(0, 0)] * 3), mode="edge")  # all have one shape
            vectors.append(np.asarray(_seen(see, pooled, self.variables, filled))[: len(shown)])
        return np.concatenate(vectors)


@partial(jax.jit, static_argnums=(0, 1))
def _seen(
    see: Callable[..., jax.Array],
    pooled: Callable[[jax.Array], jax.Array],
    variables: Variables,
    image: UInt8[Array, "B H W C"],
) -> Float[Array, "B D"]:
    """A vector of each image, of features pooled over its parts."""
    vectors = see(variables, image)
    return vectors if vectors.ndim == 2 else pooled(vectors)


def _means(features: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    return jnp.mean(features, axis=1)


def _moments(features: Float[Array, "B T D"]) -> Float[Array, "B K"]:
    return jnp.concatenate([of(features, axis=1) for of in (jnp.mean, jnp.max, jnp.std)], axis=1)


def by_each(judges: Sequence[Judge], measure: Callable[[Judge], Mapping[str, float | None]]) -> dict[str, float | None]:
    """What each of them measures: METRIC where there is one, METRIC_by_NAME where there are several."""
    found: dict[str, float | None] = {}
    for judge in judges:
        suffix = f"_by_{judge.name}" if len(judges) > 1 else ""
        found |= {f"{metric}{suffix}": value for metric, value in measure(judge).items()}
    return found


def _shown(image: UInt8[np.ndarray, "H W C"], spec: Input) -> UInt8[np.ndarray, "S S K"]:
    size, _, channels = spec.shape
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture = picture.convert("L" if channels == 1 else "RGB")
    return resample(picture, whole_box(picture.height, picture.width), size, levels=spec.limit or 256)
