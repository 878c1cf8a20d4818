"""Gaussian processes over the pixel grid."""

from dataclasses import replace

from experiments.data import DIGITS, DIGITS_IMAGE, FASHION_IMAGE, FASHION_MNIST
from vlm_jax.experiment import Experiment
from vlm_jax.models import gaussian_process
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def gaussian_process_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels; half a minute on a CPU."""
    return Experiment(
        model=gaussian_process.Config(**DIGITS_IMAGE, kernel="matern32"),
        data=DIGITS,
        training=Training(
            optimizer=Optimizer(learning_rate=0.05, eps=1e-6),
            steps=120,
            batch_size=256,
            checkpoint_every=40,
        ),
    )


def gaussian_process_fashion_mnist() -> Experiment:
    """Fashion-MNIST, 28x28, 256 levels."""
    return Experiment(
        model=gaussian_process.Config(**FASHION_IMAGE, kernel="matern12"),
        data=replace(FASHION_MNIST, train="train[:55000]", validation="train[55000:]"),
        training=Training(
            optimizer=Optimizer(learning_rate=0.03, eps=1e-6),
            steps=300,
            batch_size=512,
            checkpoint_every=100,
        ),
    )


PRESETS = (gaussian_process_tiny, gaussian_process_fashion_mnist)
