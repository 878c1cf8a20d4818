"""The layout of FID's network: there and back, what it passes over, and whose weights it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converted import assert_trees_equal
from inceptions import arrays_of, random_params
from tools.convert import convert
from vlm_jax.data import Data, Image
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import inception
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.inception import LAYOUT
from vlm_jax.pretrained.layout import abstract_params, read_params, recognised, written_keys
from vlm_jax.pretrained.source import open_source
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.workdir import load

SMALL = inception.Config(width=2, classes=5)
COUNTS = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.asarray(3)}
BESIDE = {"AuxLogits.conv0.conv.weight": np.zeros((2, 2, 1, 1), np.float32)}


def published(directory: Path, config: inception.Config = SMALL, **arrays: np.ndarray) -> tuple[Any, Path]:
    """Random parameters, and the file that has them."""
    params, path = random_params(config), directory / "weights.safetensors"
    save_file({**arrays_of(config, params), **arrays}, path)
    return params, path


@pytest.mark.parametrize("classes", [5, None])
def test_arrays_go_there_and_back(classes: int | None, tmp_path: Path):
    """Beside what gives the network nothing."""
    config = replace(SMALL, classes=classes)
    params, path = published(tmp_path, config, **COUNTS, **BESIDE)
    source = open_source(path)
    layout = recognised(source, LAYOUTS)
    assert layout.name == "inception-fid" and layout.config(source) == config
    assert_trees_equal(read_params(layout, config, source.tensors), params)
    assert layout.fields(source) == (Image(resize="squash", method="bilinear"),)


def test_keys_are_those_of_the_release():
    """94 convolutions, of each five arrays, and the last layer."""
    config = inception.Config()
    params = abstract_params(config)
    keys = written_keys(LAYOUT, config, params)
    assert len(keys) == 94 * 5 + 2
    names = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    assert {f"Mixed_7c.branch3x3dbl_3b.{name}" for name in names} <= keys.keys()
    assert keys["fc.weight"] == 4 * 1008 * 2048 and keys["Conv2d_4a_3x3.conv.weight"] == 4 * 192 * 80 * 9


def test_windows_that_are_no_squares_are_rows_and_columns_as_in_the_release():
    """Of each name, by its end."""
    small = arrays_of(SMALL, random_params(SMALL))
    assert small["Mixed_6c.branch7x7_2.conv.weight"].shape == (10, 10, 1, 7)
    assert small["Mixed_5d.branch5x5_2.conv.weight"].shape == (4, 3, 5, 5)
    windows = {key.removesuffix(".conv.weight"): array.shape[2:] for key, array in small.items() if "conv" in key}
    found: dict[tuple[int, ...], set[str]] = {}
    for key, window in windows.items():
        if window[0] != window[1]:
            found.setdefault(window, set()).add(key.partition(".")[2])
    assert found == {
        (1, 7): {"branch7x7_2", "branch7x7dbl_3", "branch7x7dbl_5", "branch7x7x3_2"},
        (7, 1): {"branch7x7_3", "branch7x7dbl_2", "branch7x7dbl_4", "branch7x7x3_3"},
        (1, 3): {"branch3x3_2a", "branch3x3dbl_3a"},
        (3, 1): {"branch3x3_2b", "branch3x3dbl_3b"},
    }


def test_the_weights_of_torchvision_are_refused(tmp_path: Path):
    """Whose names are the same."""
    _, path = published(tmp_path, replace(SMALL, classes=1000))
    with pytest.raises(UserError, match=r"fc.weight in .* tells 1000 classes, as the weights of torchvision do"):
        convert(str(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_array_too_few_is_refused(tmp_path: Path):
    arrays = arrays_of(SMALL, random_params(SMALL))
    del arrays["Mixed_6a.branch3x3.bn.running_mean"]
    save_file(arrays, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"lacks Mixed_6a\.branch3x3\.bn\.running_mean, which inception-fid has"):
        convert(str(tmp_path / "weights.safetensors"), tmp_path / "run")


@pytest.mark.slow
def test_a_converted_run_goes_back_into_what_it_was_made_of(tmp_path: Path):
    params, path = published(tmp_path)
    convert(str(path), tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.experiment.model == SMALL
    assert_trees_equal(loaded.variables["params"], params)
    convert(str(tmp_path / "run"), tmp_path / "out", layout="inception-fid")
    assert_trees_equal(load_file(tmp_path / "out" / "model.safetensors"), load_file(path))


def test_another_size_is_not_written():
    training = Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1)
    experiment = Experiment(model=replace(SMALL, size=75), data=Data(name=None), training=training)
    assert LAYOUT.export is not None
    with pytest.raises(UserError, match="size is 75 and Inception's layouts have 299 alone"):
        LAYOUT.export(experiment, None)
