"""Kernel density estimators. The first batch is the estimator: the batch size is that of the training split."""

from experiments.data import DIGITS, DIGITS_IMAGE, FASHION_IMAGE
from vlm_jax.data import Data
from vlm_jax.experiment import Experiment
from vlm_jax.models import kde
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

DIGITS_TRAINING = Training(
    optimizer=Optimizer(learning_rate=0.1, eps=1e-6), steps=40, batch_size=1256, checkpoint_every=10
)


def kde_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels, an exact probability; one minute on a CPU."""
    return Experiment(
        model=kde.Config(**DIGITS_IMAGE, kernel="discretised"),
        data=DIGITS,
        training=DIGITS_TRAINING,
    )


def kde_tiny_gaussian() -> Experiment:
    """Handwritten digits, 8x8, 17 levels, a density of dequantised pixels; one minute on a CPU."""
    return Experiment(
        model=kde.Config(**DIGITS_IMAGE, kernel="gaussian"),
        data=DIGITS,
        training=DIGITS_TRAINING,
    )


def kde_fashion_mnist() -> Experiment:
    """Fashion-MNIST, 28x28, 256 levels, an exact probability from all 60,000 images.

    Every step reads them all anew, about half a minute of one CPU core.
    """
    return Experiment(
        model=kde.Config(**FASHION_IMAGE, kernel="discretised", queries=256),
        data=Data(name="fashion_mnist"),
        training=Training(
            optimizer=Optimizer(learning_rate=0.3, eps=1e-6),
            steps=15,
            batch_size=60_000,
            checkpoint_every=5,
        ),
    )


PRESETS = (kde_tiny, kde_tiny_gaussian, kde_fashion_mnist)
