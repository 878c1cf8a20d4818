"""Patches of noisy images: what a stem and a head of convolutions add to linear layers, and how far they see."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn.image_patches import ConvolutionalPatches, LinearPatches, PatchReader, PatchWriter

LINEAR, CONVOLUTIONAL = LinearPatches(patch_size=4), ConvolutionalPatches(patch_size=4, channels=5)
WIDTH, CHANNELS = 6, 3
IMAGE = jax.random.normal(jax.random.key(0), (2, 8, 8, CHANNELS))
TIME = jnp.array([0.1, 0.7])
HIDDEN = jax.random.normal(jax.random.key(1), (2, 4, WIDTH))


def reader(patches: LinearPatches) -> PatchReader:
    return PatchReader(patches, WIDTH, "float32")


def writer(patches: LinearPatches) -> PatchWriter:
    return PatchWriter(patches, CHANNELS)


def moved(tree: Any) -> Any:
    """As after some steps: no parameter is zero."""
    key = jax.random.key(2)
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(key, leaf.shape), tree)


def test_a_stem_and_a_head_begin_as_the_linear_layers_beside_them() -> None:
    """Also where these have learned."""
    read = moved(reader(LINEAR).init(jax.random.key(3), IMAGE, TIME))
    begun = reader(CONVOLUTIONAL).init(jax.random.key(3), IMAGE, TIME)
    both = {"params": {**read["params"], "stem": begun["params"]["stem"]}}
    expected = reader(LINEAR).apply(read, IMAGE, TIME)[0]
    np.testing.assert_array_equal(reader(CONVOLUTIONAL).apply(both, IMAGE, TIME)[0], expected)
    written = moved(writer(LINEAR).init(jax.random.key(3), HIDDEN, ()))
    begun = writer(CONVOLUTIONAL).init(jax.random.key(3), HIDDEN, ())
    both = {"params": {**written["params"], "head": begun["params"]["head"]}}
    expected = writer(LINEAR).apply(written, HIDDEN, ())
    np.testing.assert_array_equal(writer(CONVOLUTIONAL).apply(both, HIDDEN, ()), expected)


@pytest.mark.parametrize(("patches", "far"), [(LINEAR, 0), (CONVOLUTIONAL, 2)])
def test_two_convolutions_see_two_pixels_over_the_borders_of_a_patch(patches: LinearPatches, far: int) -> None:
    """Of the first patch, 4 pixels wide; in a row from it on."""
    variables = moved(reader(patches).init(jax.random.key(3), IMAGE, TIME))

    def first_patch(x: jax.Array) -> jax.Array:
        token: jax.Array = reader(patches).apply(variables, x, TIME)[0][:, 0].sum()
        return token

    seen = np.abs(jax.grad(first_patch)(IMAGE)).sum(axis=(0, 1, 3)) > 0
    np.testing.assert_array_equal(seen, np.arange(8) < 4 + far)
    variables = moved(writer(patches).init(jax.random.key(3), HIDDEN, ()))
    changed = HIDDEN.at[:, 0].add(1.0)
    apart = writer(patches).apply(variables, changed, ()) - writer(patches).apply(variables, HIDDEN, ())
    np.testing.assert_array_equal(np.abs(apart).sum(axis=(0, 1, 3)) > 0, np.arange(8) < 4 + far)
