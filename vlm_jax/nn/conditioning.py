"""What a diffusion model's network is told beside the noisy image: the time, and perhaps a class or a text."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.contract import Rule
from vlm_jax.sharding import constrain

Image = Float[Array, "B H W C"]
Time = Float[Array, " B"]
Label = Int[Array, " B"] | None


class Text(NamedTuple):
    """What an encoder makes of texts."""

    features: Float[Array, "B S E"]
    inside: Bool[Array, "B S"]
    """Which places are the text's; the others are padding."""
    known: Bool[Array, " B"]
    """False: the network is to be told nothing of it."""


class Told(NamedTuple):
    """A class and a text of each image, of a network that is told them."""

    label: Label = None
    text: Text | None = None


def doubled(told: Told, classes: int | None) -> Told:
    """What each image is told, and after that as many times nothing."""
    label, text = told
    if label is not None and classes is not None:
        label = jnp.concatenate([label, jnp.full_like(label, classes)])
    if text is not None:
        features, inside = (jnp.concatenate([part, part]) for part in (text.features, text.inside))
        text = Text(features, inside, jnp.concatenate([text.known, jnp.zeros_like(text.known)]))
    return Told(label, text)


def timestep_features(time: Time, count: int, *, endpoint: bool) -> Float[Array, "B F"]:
    """Sines, then cosines, of the time at frequencies that fall geometrically from 1 to 1/10000 (1706.03762).

    Args:
      time: 0 to 1000.
      endpoint: whether the last frequency is 1/10000 itself, as in DDPM, or the one before it in a longer series, as
        in DiT.
    """
    frequencies = 10_000.0 ** -jnp.linspace(0, 1, count // 2, endpoint=endpoint)
    angles = time.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Conditioning(nn.Module):
    """Time and class -> one vector, their sum. The class after the last means none."""

    width: int
    features: int
    """Sines and cosines of the time."""
    endpoint: bool
    classes: int | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, time: Time, label: Label = None) -> Float[Array, "B D"]:
        x = timestep_features(time, self.features, endpoint=self.endpoint)
        x = nn.Dense(self.width, dtype=self.dtype, name="time_in")(x)
        x = nn.Dense(self.width, dtype=self.dtype, name="time_out")(nn.silu(x))
        if self.classes is not None:
            table = self.param("label", nn.initializers.normal(0.02), (self.classes + 1, self.width))
            label = jnp.full(time.shape, self.classes) if label is None else label
            # Gathered before the lookup: of a split table the partitioner would look up the whole batch everywhere.
            x = x + constrain(table, None, None)[label].astype(x.dtype)
        return constrain(x, "batch", None)


class Untold(nn.Module):
    """The features of a text, in whose place those stand that the network learns for one that it is not told.

    All their places are attended to. PixArt's null caption (2310.00426); Stable Diffusion's are of an empty text.
    """

    @nn.compact
    def __call__(self, text: Text) -> Text:
        _, places, width = text.features.shape
        nothing = self.param("features", nn.initializers.normal(width**-0.5), (places, width))
        known = text.known[:, None]
        features = jnp.where(known[..., None], text.features, constrain(nothing, None, None))
        return Text(constrain(features, "batch", None, None), text.inside | ~known, text.known)


def conditioning_rules(classes: int | None) -> tuple[Rule, ...]:
    """Sharding rules of a `Conditioning`."""
    return (
        (r"time_in/kernel$", (None, "embed")),
        (r"time_out/kernel$", ("embed", None)),
        (r"time_(in|out)/bias$", (None,)),
        *(((r"label$", (None, "embed")),) if classes is not None else ()),
    )
