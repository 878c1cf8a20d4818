"""What an autoencoder keeps: pixels in the data's range, captions that are still found, and codes in use by hand."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from judging import judge
from skimage.metrics import peak_signal_noise_ratio

from vlm_jax.contract import Input, Model
from vlm_jax.evals import Judge, Pictures, Subject, reconstruction
from vlm_jax.evals.pca import psnr_of_pca
from vlm_jax.evals.reconstruction import use_of_codes

RNG = np.random.default_rng(0)


def subject(images: np.ndarray, levels: int, latents: Input, encode: Any, decode: Any, **given: Any) -> Subject:
    """Two images at a time, the last batch filled up with copies of the last."""
    filled = np.concatenate([images, images[len(images) % 2 * -1 :][: len(images) % 2]])
    batches = [({"image": filled[at : at + 2]}, min(2, len(images) - at)) for at in range(0, len(images), 2)]
    model = Model(
        inputs={"image": Input(images.shape[1:], "uint8", levels)},
        init=lambda *_: {},
        loss=lambda *_, **__: None,
        rules=(),
        latents=latents,
        encode=lambda _, image, key=None: encode(image),
        decode=lambda _, latents: decode(latents),
    )
    return Subject(model=model, variables={}, batches=lambda: iter(batches), examples=len(images), **given)


def brighter(images: np.ndarray, levels: int, added: int, **given: Any) -> Subject:
    """An image is its own latents, decoded with as much added to its levels."""
    spec = Input(images.shape[1:], "float32")
    return subject(images, levels, spec, jnp.float32, lambda latents: jnp.uint8(latents) + jnp.uint8(added), **given)


def test_it_is_measured_in_the_data_s_own_range() -> None:
    images = RNG.integers(0, 16, (2, 8, 8, 1)).astype(np.uint8)
    metrics = reconstruction.run(brighter(images, 17, 1))
    assert metrics["psnr"] == pytest.approx(10 * math.log10(16**2), rel=1e-6)
    assert metrics["psnr"] == pytest.approx(peak_signal_noise_ratio(images[0], images[0] + 1, data_range=16))
    assert 0.9 < metrics["ssim"] < 1 and metrics.keys() == {"psnr", "ssim"}


def test_images_smaller_than_the_window_of_ssim_have_none_and_equal_ones_an_infinite_psnr() -> None:
    assert reconstruction.run(brighter(np.zeros((3, 4, 4, 1), np.uint8), 17, 0)) == {"psnr": math.inf}


IMAGES = np.arange(0, 80, 16, dtype=np.uint8)[:, None, None, None] + np.zeros((5, 2, 2, 3), np.uint8)
CAPTIONS = ["red cat", "green dog", "blue bird", "tree", "moon"]
KNOWN = [{"captions": (caption,)} for caption in CAPTIONS]
SEEN = np.array([0, 1, 2, 3, 3, 0, 1, 0, 3, 0])
"""What a judge takes each image for, and then each image that is brighter by one."""


def witness(name: str = "judge", seen: np.ndarray = SEEN) -> Judge:
    """Of the images it takes one for another; of the brighter ones, the third and the last as well."""
    return judge(np.concatenate([IMAGES, IMAGES + 1]), np.eye(5)[seen], CAPTIONS, np.eye(5), name)


def test_captions_are_still_found_by_what_is_left() -> None:
    """By the images four of five, the last is taken for a tree; by the copies three of those."""
    found = reconstruction.run(brighter(IMAGES, 256, 1, judges=(witness(),), records=lambda: iter(KNOWN)))
    assert (found["recall@1"], found["real_recall@1"], found["recall@1_kept"]) == (0.6, 0.8, pytest.approx(0.75))
    unchanged = reconstruction.run(brighter(IMAGES, 256, 0, judges=(witness(),), records=lambda: iter(KNOWN)))
    assert (unchanged["recall@1"], unchanged["recall@1_kept"]) == (0.8, 1)


def test_each_judge_speaks_for_itself_and_one_who_finds_nothing_tells_nothing() -> None:
    judges = (witness("a"), witness("b", np.zeros(10, int) + 4), witness("c", (SEEN + 2) % 5))
    found = reconstruction.run(brighter(IMAGES, 256, 1, judges=judges, records=lambda: iter(KNOWN)))
    assert found["recall@1_kept_by_a"] == pytest.approx(0.75)
    assert (found["recall@1_by_b"], found["real_recall@1_by_b"]) == (0.2, 0.2)
    assert found["real_recall@1_by_c"] == 0 and found["recall@1_kept_by_c"] is None
    assert "recall@1" not in found


def test_without_captions_or_a_judge_who_reads_there_is_nothing_to_find() -> None:
    undefined = dict.fromkeys(("recall@1", "real_recall@1", "recall@1_kept"))
    blind = Judge(witness().model, {})
    for given in ({"judges": (witness(),)}, {"judges": (blind,), "records": lambda: iter(KNOWN)}):
        found = reconstruction.run(brighter(IMAGES, 256, 1, **given))
        assert {name: value for name, value in found.items() if "recall" in name} == undefined


def test_use_and_perplexity_of_codes_are_of_the_whole_split_and_a_mean_of_several_books() -> None:
    even, skewed = np.arange(16).reshape(4, 2, 2) % 4, np.zeros((4, 2, 2), int)
    assert use_of_codes(even, 8) == {"code_use": 0.5, "code_perplexity": pytest.approx(4)}
    assert use_of_codes(skewed, 8) == {"code_use": 1 / 8, "code_perplexity": pytest.approx(1)}
    skewed[0, 0] = 5  # two of sixteen
    entropy = -(1 / 8 * math.log(1 / 8) + 7 / 8 * math.log(7 / 8))
    assert use_of_codes(skewed, 8)["code_perplexity"] == pytest.approx(math.exp(entropy))
    found = use_of_codes(np.stack([even, skewed], axis=-1), 8)
    assert found == {"code_use": (0.5 + 0.25) / 2, "code_perplexity": pytest.approx((4 + math.exp(entropy)) / 2)}


def test_of_a_model_of_codes_their_use_is_measured_without_the_padding_of_the_last_batch() -> None:
    """A map of one code, the image's level over sixteen: of five images five codes, each once."""
    spec = Input((1, 1), "int32", 10)
    found = reconstruction.run(
        subject(
            IMAGES,
            256,
            spec,
            lambda image: jnp.int32(image[:, :1, :1, 0]) // 16,
            lambda codes: jnp.uint8(jnp.broadcast_to(16 * codes[..., None], (len(codes), 2, 2, 3))),
        )
    )
    assert found == {"psnr": math.inf, "code_use": 0.5, "code_perplexity": pytest.approx(5)}


@pytest.mark.parametrize(
    ("latents", "numbers"),
    [
        (Input((2, 2, 3), "float32"), 12),
        (Input((2, 2), "int32", 9), 4),
        (Input((2, 2, 2), "int32", 9), 8),  # of two books
        (Input((5,), "float32"), None),  # no map
        ({"a": Input((2, 2, 1), "float32")}, None),  # not one
    ],
)
def test_components_of_as_many_numbers_as_the_latents_stand_beside(latents: Any, numbers: int | None) -> None:
    images = RNG.integers(0, 256, (3, 16, 16, 1)).astype(np.uint8)
    training = RNG.integers(0, 256, (20, 16, 16, 1)).astype(np.uint8)
    pictures = Pictures(levels=256, held_out=lambda: iter([images]), training=lambda: (({}, each) for each in training))

    def encode(image: Any) -> Any:
        made = {"": latents} if isinstance(latents, Input) else latents
        found = {name: jnp.zeros((len(image), *spec.shape), spec.dtype) for name, spec in made.items()}
        return found.get("", found)

    def decode(latents: Any) -> Any:
        (first, *_) = latents.values() if isinstance(latents, dict) else [latents]
        return jnp.zeros((len(first), 16, 16, 1), jnp.uint8)

    found = reconstruction.run(subject(images, 256, latents, encode, decode, pictures=pictures))
    assert found.get("psnr_of_pca") == (None if numbers is None else psnr_of_pca(pictures, numbers))
    alone = Pictures(levels=256, held_out=pictures.held_out)  # of a model that was trained elsewhere
    assert "psnr_of_pca" not in reconstruction.run(subject(images, 256, latents, encode, decode, pictures=alone))
