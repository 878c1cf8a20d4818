"""Each measurement against what is known in closed form."""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from vlm_jax.contract import Input, Model
from vlm_jax.data import train_tokenizer
from vlm_jax.evals import EVALUATIONS, Labelled, Subject, likelihood, reconstruction, retrieval, zero_shot
from vlm_jax.evals.retrieval import recall_at

IMAGE = Input((8, 8, 1), "uint8", 17)


def model(**capabilities: object) -> Model:
    """A model that can do just what a test gives it."""
    inputs = {"image": IMAGE, "tokens": Input((4,), "int32", 300)}
    return Model(inputs=inputs, init=lambda *_: {}, loss=lambda *_, **__: None, rules=(), **capabilities)


def batches(*parts: tuple[dict, int]) -> Callable[[], Iterator[tuple[dict, int]]]:
    return lambda: iter(parts)


def test_recall_counts_ranks_and_holds_ties_against_the_model() -> None:
    similarity = jnp.array([[9.0, 1, 1, 1], [5, 4, 1, 1], [5, 5, 4, 1], [2, 2, 2, 2]])
    assert [recall_at(similarity, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_a_constant_encoder_retrieves_nothing() -> None:
    assert recall_at(jnp.ones((20, 20)), 10) == 0


def test_retrieval_goes_both_ways_and_ignores_the_padding_of_the_last_batch() -> None:
    """Image i is e_i and text i is e_i, but texts 0 and 1 are both e_0: image 1 finds no text of its own."""
    texts = jnp.eye(3)[jnp.array([0, 0, 2])]
    subject = Subject(
        model=model(encode_image=lambda _, image: jnp.eye(3)[image], encode_text=lambda _, tokens: texts[tokens]),
        variables={},
        batches=batches(
            ({"image": jnp.array([0, 1]), "tokens": jnp.array([0, 1])}, 2),
            ({"image": jnp.array([2, 2]), "tokens": jnp.array([2, 2])}, 1),
        ),
    )
    metrics = retrieval.run(subject)
    # Image 0 ties between texts 0 and 1; image 1 ties with all but text 2; image 2 is clear.
    assert metrics["image_to_text_recall@1"] == pytest.approx(1 / 3)
    assert metrics["text_to_image_recall@1"] == pytest.approx(2 / 3)
    assert metrics["text_to_image_recall@5"] == metrics["image_to_text_recall@10"] == 1


def test_zero_shot_takes_the_mean_of_the_prompts_directions() -> None:
    """ "a" and "b" differ in each prompt; the class of an image is the nearer mean, whatever a single prompt says."""
    tokenizer = train_tokenizer(["a b c x y"], 300)
    ids = {name: int(tokenizer.encode([name], 4)[0, 1]) for name in "abxy"}
    vectors = np.zeros((300, 2), np.float32)
    vectors[ids["a"]], vectors[ids["b"]] = (1, 0), (0, 1)
    shift = jnp.asarray(vectors)

    def encode_text(_: object, tokens: jax.Array) -> jax.Array:
        raw = shift[tokens].sum(1) + jnp.array([0.1, 0.1])
        return raw / jnp.linalg.norm(raw, axis=-1, keepdims=True)

    shown = ({"image": jnp.array([[1.0, 0], [0.9, 0.1], [0.2, 0.8], [0.0, 1]]), "label": jnp.array([0, 0, 0, 1])}, 3)
    subject = Subject(
        model=model(encode_image=lambda _, image: image, encode_text=encode_text),
        variables={},
        batches=batches(),
        tokenizer=tokenizer,
        labelled=Labelled(batches(shown), ("a", "b"), ("{}", "{} x", "y {}")),
    )
    assert zero_shot.run(subject) == {"accuracy": pytest.approx(2 / 3), "chance": 0.5, "examples": 3}
    directions = zero_shot.class_embeddings(subject)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)


def test_bits_per_dim_of_a_uniform_model_is_the_logarithm_of_its_levels() -> None:
    uniform = -64 * math.log(17)
    subject = Subject(
        model=model(log_likelihood=lambda _, batch, key: jnp.full(len(batch["image"]), uniform), bound="exact"),
        variables={},
        batches=batches(({"image": jnp.zeros((4, 8, 8, 1))}, 4), ({"image": jnp.zeros((4, 8, 8, 1))}, 1)),
    )
    metrics = likelihood.run(subject)
    assert metrics["bits_per_dim"] == pytest.approx(math.log2(17), rel=1e-6)
    assert metrics["bits_per_dim_standard_error"] == pytest.approx(0, abs=1e-6)


def test_standard_error_is_that_of_the_mean_over_images() -> None:
    nats = np.array([-100.0, -120, -90, -110])
    bits = -nats / (64 * math.log(2))
    metrics = likelihood.summary(nats, IMAGE.shape)
    assert metrics["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-6)
    assert metrics["bits_per_dim_standard_error"] == pytest.approx(bits.std(ddof=1) / 2, rel=1e-5)


def test_importance_weights_are_averaged_inside_the_logarithm() -> None:
    """For log-normal weights of mean one the estimate tends to 0, and the mean of the logarithms to -s^2 / 2."""
    scale = 0.7

    def log_weight(_: object, batch: dict, key: jax.Array) -> jax.Array:
        return scale * jax.random.normal(key, (len(batch["image"]),)) - scale**2 / 2

    subject = Subject(
        model=model(log_weight=log_weight, log_likelihood=log_weight, bound="lower"),
        variables={},
        batches=batches(({"image": jnp.zeros((2000, 8, 8, 1))}, 2000)),
    )
    to_nats = -64 * math.log(2)
    tight = likelihood.run_importance_weighted(subject)["bits_per_dim"] * to_nats
    loose = likelihood.run(subject)["bits_per_dim"] * to_nats
    assert loose == pytest.approx(-(scale**2) / 2, abs=0.03)
    # The bias of log(mean of K) is -var(w) / 2K.
    assert tight == pytest.approx(-(math.exp(scale**2) - 1) / (2 * likelihood.IMPORTANCE_DRAWS), abs=0.01)


@pytest.mark.parametrize("images", [2, 5000])
def test_noise_is_averaged_over_thousands_of_draws_however_few_the_images_are(images: int) -> None:
    subject = Subject(
        model=model(log_likelihood=lambda _, batch, key: jax.random.normal(key, (len(batch["image"]),)), bound="lower"),
        variables={},
        batches=batches(({"image": jnp.zeros((images, 8, 8, 1))}, images)),
    )
    nats = likelihood.run(subject)["bits_per_dim"] * 64 * math.log(2)
    assert 0 < abs(nats) < 4 / math.sqrt(max(images, likelihood.NOISE_DRAWS))


def test_reconstruction_measures_in_the_data_s_own_range() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 16, (2, 8, 8, 1)).astype(np.uint8)
    subject = Subject(
        model=model(reconstruct=lambda _, image: image + jnp.uint8(1)),
        variables={},
        batches=batches(({"image": image}, 2)),
    )
    metrics = reconstruction.run(subject)
    assert metrics["psnr"] == pytest.approx(10 * math.log10(16**2), rel=1e-6)
    assert metrics["psnr"] == pytest.approx(peak_signal_noise_ratio(image[0], image[0] + 1, data_range=16))
    assert 0.9 < metrics["ssim"] < 1


def test_evaluations_run_where_their_capabilities_are_and_nowhere_else() -> None:
    def applicable(subject: Subject) -> set[str]:
        return {evaluation.name for evaluation in EVALUATIONS if evaluation.applies_to(subject)}

    def known(*_: object) -> None:
        return None

    assert applicable(Subject(model(), {}, batches())) == set()
    assert applicable(Subject(model(log_likelihood=known), {}, batches())) == {"likelihood"}
    both = model(encode_image=known, encode_text=known)
    assert applicable(Subject(model(encode_image=known), {}, batches())) == set()
    assert applicable(Subject(both, {}, batches())) == {"retrieval"}
    labelled = Labelled(batches(), ("a",), ("{}",))
    tokenizer = train_tokenizer(["a"], 300)
    assert applicable(Subject(both, {}, batches(), tokenizer, labelled)) == {"retrieval", "zero_shot"}
