"""Inception of random, perturbed weights computes what that of pytorch-fid does, from images as they are drawn."""

from typing import Any

import jax
import numpy as np
import pytest
import torch

from inceptions import arrays_of, random_params
from vlm_jax.evals.judge import Judge
from vlm_jax.models import build, inception
from vlm_jax.models.inception import scaled

try:
    from pytorch_fid import inception as theirs
except RuntimeError:  # PyPI's torchvision is compiled for a torch with CUDA; the network needs none of its operators
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from pytorch_fid import inception as theirs

CONFIG = inception.Config(image_size=96)
PARAMS = random_params(CONFIG)


@pytest.fixture(scope="module")
def published() -> Any:
    """A network of theirs, which loads our weights as they are written, and would refuse one too many or too few."""
    arrays = {key: torch.from_numpy(array) for key, array in arrays_of(CONFIG, PARAMS).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: arrays)
        return theirs.InceptionV3([theirs.InceptionV3.DEFAULT_BLOCK_INDEX]).eval()


def pictures(size: int, count: int = 3) -> np.ndarray:
    """Of stripes and noise of some colour and strength each, for the network to see other things in each."""
    rng = np.random.default_rng(size)
    places = np.arange(size)[:, None, None] * np.linspace(0.02, 1, count)[:, None, None, None]
    waves = np.sin(places) * rng.uniform(0, 100, (count, 1, 1, 3)) + rng.uniform(60, 190, (count, 1, 1, 3))
    noise = rng.normal(size=(count, size, size, 3)) * np.linspace(5, 60, count)[:, None, None, None]
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def features(model: Any, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.float32(images) / 255).permute(0, 3, 1, 2))[0][:, :, 0, 0].numpy()


def test_keys_and_sizes_are_the_release_s(published: Any) -> None:
    """But for counts of batches, which no network in use looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        due = {key: tuple(value.shape) for key, value in theirs.fid_inception_v3().state_dict().items()}
    due = {key: shape for key, shape in due.items() if not key.endswith("num_batches_tracked")}
    assert due == {key: array.shape for key, array in arrays_of(CONFIG, PARAMS).items()}


def test_a_judge_sees_what_pytorch_fid_does(published: Any) -> None:
    """Within 1e-4 of each feature, or of what features are on average where they are smaller: of images that are
    enlarged, and of what tells them apart."""
    images = pictures(96)
    expected = features(published, images)
    assert np.std(expected, axis=0).mean() > 0.01 * expected.mean()
    judge = Judge(build(CONFIG), {"params": PARAMS}, fid=True)
    found = judge.embeddings([images], 256)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.mean())
    apart = expected - expected.mean(axis=0)
    np.testing.assert_allclose(found - found.mean(axis=0), apart, atol=1e-4 * np.abs(apart).max())


@pytest.mark.parametrize("size", [32, 299, 512])
def test_images_are_scaled_as_pytorch_fid_does(size: int) -> None:
    images = pictures(size)
    x = torch.from_numpy(np.float32(images) / 255).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    found = jax.jit(scaled, static_argnums=1)(images, 299)
    np.testing.assert_allclose(found, 2 * expected.permute(0, 2, 3, 1).numpy() - 1, atol=1e-4)
