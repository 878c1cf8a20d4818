"""The network of FID beside the same in NumPy and float64, branch by branch; and how it scales images."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from inceptions import arrays_of, random_params
from vlm_jax.contract import abstract_batch
from vlm_jax.errors import UserError
from vlm_jax.models import build, inception
from vlm_jax.models.inception import measures_fid, scaled
from vlm_jax.sharding import MeshShape, make_mesh, parameter_shardings
from vlm_jax.trees import count_parameters

SMALL = inception.Config(image_size=139, size=139, width=2, classes=None)
"""Of whose image 3x3 places are left."""
RNG = np.random.default_rng(0)


def windows(x: np.ndarray, size: tuple[int, int], around: float | None, stride: int = 1) -> np.ndarray:
    """[B, h, w, C, rows, columns]; None: there is nothing around."""
    if around is not None:
        rows, columns = (side // 2 for side in size)
        x = np.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)), constant_values=around)
    return np.lib.stride_tricks.sliding_window_view(x, size, axis=(1, 2))[:, ::stride, ::stride]


class Reference:
    """torchvision's `inception_v3` with the blocks of pytorch-fid, of arrays by their keys."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = {key: array.astype(np.float64) for key, array in arrays.items()}

    def unit(self, key: str, x: np.ndarray, *, stride: int = 1, inside: bool = False) -> np.ndarray:
        """`BasicConv2d`; where it is `inside`, without zeros around."""
        kernel = self.arrays[f"{key}.conv.weight"]
        seen = windows(x, kernel.shape[2:], None if inside else 0.0, stride)
        y = np.einsum("bhwcij,ocij->bhwo", seen, kernel, optimize=True)
        bn = {name: self.arrays[f"{key}.bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
        y = (y - bn["running_mean"]) / np.sqrt(bn["running_var"] + 0.001) * bn["weight"] + bn["bias"]
        return np.maximum(y, 0)

    def chain(self, block: str, x: np.ndarray, *names: str) -> np.ndarray:
        for name in names:
            x = self.unit(f"{block}.{name}", x)
        return x

    def averaged(self, block: str, x: np.ndarray) -> np.ndarray:
        """Of the places that there are."""
        there = windows(np.ones_like(x), (3, 3), 0.0).sum(axis=(-1, -2))
        return self.unit(f"{block}.branch_pool", windows(x, (3, 3), 0.0).sum(axis=(-1, -2)) / there)

    def a(self, block: str, x: np.ndarray) -> np.ndarray:
        ends = [
            self.chain(block, x, "branch1x1"),
            self.chain(block, x, "branch5x5_1", "branch5x5_2"),
            self.chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            self.averaged(block, x),
        ]
        return np.concatenate(ends, axis=-1)

    def b(self, block: str, x: np.ndarray) -> np.ndarray:
        double = self.chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
        ends = [
            self.unit(f"{block}.branch3x3", x, stride=2, inside=True),
            self.unit(f"{block}.branch3x3dbl_3", double, stride=2, inside=True),
            windows(x, (3, 3), None, 2).max(axis=(-1, -2)),
        ]
        return np.concatenate(ends, axis=-1)

    def c(self, block: str, x: np.ndarray) -> np.ndarray:
        ends = [
            self.chain(block, x, "branch1x1"),
            self.chain(block, x, *(f"branch7x7_{i}" for i in range(1, 4))),
            self.chain(block, x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
            self.averaged(block, x),
        ]
        return np.concatenate(ends, axis=-1)

    def d(self, block: str, x: np.ndarray) -> np.ndarray:
        ends = [
            self.unit(f"{block}.branch3x3_2", self.chain(block, x, "branch3x3_1"), stride=2, inside=True),
            self.unit(
                f"{block}.branch7x7x3_4",
                self.chain(block, x, *(f"branch7x7x3_{i}" for i in range(1, 4))),
                stride=2,
                inside=True,
            ),
            windows(x, (3, 3), None, 2).max(axis=(-1, -2)),
        ]
        return np.concatenate(ends, axis=-1)

    def e(self, block: str, x: np.ndarray, *, last: bool) -> np.ndarray:
        single = self.chain(block, x, "branch3x3_1")
        double = self.chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
        largest = windows(x, (3, 3), -np.inf).max(axis=(-1, -2))
        ends = [
            self.chain(block, x, "branch1x1"),
            *(self.chain(block, single, f"branch3x3_2{side}") for side in "ab"),
            *(self.chain(block, double, f"branch3x3dbl_3{side}") for side in "ab"),
            self.unit(f"{block}.branch_pool", largest) if last else self.averaged(block, x),
        ]
        return np.concatenate(ends, axis=-1)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        x = self.unit("Conv2d_1a_3x3", 2 * (image / 255) - 1, stride=2, inside=True)
        x = self.unit("Conv2d_2b_3x3", self.unit("Conv2d_2a_3x3", x, inside=True))
        x = self.unit("Conv2d_3b_1x1", windows(x, (3, 3), None, 2).max(axis=(-1, -2)))
        x = windows(self.unit("Conv2d_4a_3x3", x, inside=True), (3, 3), None, 2).max(axis=(-1, -2))
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.a(block, x)
        x = self.b("Mixed_6a", x)
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.c(block, x)
        x = self.e("Mixed_7b", self.d("Mixed_7a", x), last=False)
        return self.e("Mixed_7c", x, last=True)


def test_it_computes_what_the_same_does_in_numpy() -> None:
    """Of each place, row by row."""
    params, image = random_params(SMALL), RNG.integers(0, 256, (2, 139, 139, 3)).astype(np.uint8)
    expected = Reference(arrays_of(SMALL, params))(image)
    assert expected.shape == (2, 3, 3, 128) and np.ptp(expected, axis=(1, 2)).max() > 0.1
    found = jax.jit(build(SMALL).image_features)({"params": params}, image)
    np.testing.assert_allclose(found, expected.reshape(2, 9, 128), rtol=0, atol=1e-5 * expected.max())


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Between the two nearest pixels of each axis, whose centres are at halves; beyond the edge the last goes on."""
    for axis in (1, 2):
        count = image.shape[axis]
        places = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
        before = np.floor(places).astype(int)
        share = (places - before).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        one, other = (np.take(image, np.minimum(before + i, count - 1), axis=axis) for i in (0, 1))
        image = one + share * (other - one)
    return image


@pytest.mark.parametrize("size", [8, 64, 299, 512])
def test_images_are_scaled_between_the_nearest_pixels_however_large_they_are(size: int) -> None:
    """Of 512 to 299 an antialiased one would look at more."""
    image = RNG.integers(0, 256, (1, size, size, 3)).astype(np.uint8)
    expected = 2 * bilinear(image.astype(np.float64) / 255, 299) - 1
    np.testing.assert_allclose(scaled(jax.numpy.asarray(image), 299), expected, atol=1e-4)


def abstract(config: inception.Config) -> tuple[Any, Any]:
    """The model, and its variables as shapes."""
    model = build(config)
    return model, jax.eval_shape(model.init, jax.random.key(0), abstract_batch(model.inputs, 1))


def test_the_published_sizes() -> None:
    """As pytorch-fid counts its parameters and buffers (`tests/parity` asks it); 2,065,392 are of the last layer."""
    model, variables = abstract(inception.Config())
    assert count_parameters(variables) == 23_885_392
    features = jax.eval_shape(model.image_features, variables, abstract_batch(model.inputs, 2)["image"])
    assert features.shape == (2, 64, 2048)
    assert count_parameters(abstract(inception.Config(classes=None))[1]) == 23_885_392 - 2049 * 1008


@pytest.mark.parametrize("classes", [16, None])
def test_filters_are_split_by_the_mesh_and_so_is_the_last_layer(classes: int | None) -> None:
    model, variables = abstract(inception.Config(width=16, classes=classes))
    layouts = parameter_shardings(variables["params"], model.rules, make_mesh(MeshShape(fsdp=8)))
    assert layouts["Mixed_5b"]["branch1x1"]["conv"]["kernel"].spec == PartitionSpec(None, None, None, "fsdp")
    assert classes is None or layouts["fc"]["kernel"].spec == PartitionSpec("fsdp", None)


def test_every_product_is_as_exact_as_the_machine_can() -> None:
    """A TPU would else round to bfloat16 what figures hang on."""
    model, variables = abstract(SMALL)
    program = jax.make_jaxpr(model.image_features)(variables, abstract_batch(model.inputs, 1)["image"])
    highest = (jax.lax.Precision.HIGHEST,) * 2
    found = [equation.params["precision"] for equation in program.eqns if "precision" in equation.params]
    nested = [
        equation.params["precision"]
        for outer in program.eqns
        for inner in [outer.params.get("jaxpr")]
        if inner is not None
        for equation in inner.jaxpr.eqns
        if "precision" in equation.params
    ]
    assert len(found) == 94 and set(found + nested) == {highest}


def test_it_is_that_of_fid_of_the_published_sizes_alone() -> None:
    assert measures_fid(inception.Config()) and measures_fid(inception.Config(image_size=32))
    for settings in ({"width": 16}, {"size": 139}, {"classes": None}, {"classes": 1001}):
        assert not measures_fid(inception.Config(**settings))
    assert not measures_fid(object())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 3}, "width is 3: it must be even"),
        ({"size": 74}, "size is 74: of less than 75 pixels a side no place is left"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inception.Config(**settings)


def test_of_the_least_image_one_place_is_left() -> None:
    model, variables = abstract(inception.Config(image_size=2, size=inception.LEAST, width=2, classes=None))
    features = jax.eval_shape(model.image_features, variables, abstract_batch(model.inputs, 1)["image"])
    assert features.shape == (1, 1, 128)
