"""Gated PixelCNNs."""

from dataclasses import replace

from experiments.data import (
    CIFAR10,
    DIGITS,
    DIGITS_IMAGE,
    FASHION_IMAGE,
    FASHION_MNIST,
    FLIPPED,
    SMALL,
    TINY,
    TINY_OPTIMIZER,
)
from vlm_jax.experiment import Experiment
from vlm_jax.models import pixelcnn
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def pixelcnn_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels; two minutes on a CPU."""
    return Experiment(
        model=pixelcnn.Config(**DIGITS_IMAGE, width=48, depth=6, dropout=0.2),
        data=DIGITS,
        training=replace(
            TINY,
            optimizer=replace(TINY_OPTIMIZER, learning_rate=3e-3, weight_decay=0.05),
            steps=800,
            batch_size=64,
            checkpoint_every=100,
        ),
    )


def pixelcnn_fashion_mnist() -> Experiment:
    """Fashion-MNIST, 28x28, 256 levels, a mixture of ten logistics; an hour on a GPU.

    Needs fashion_mnist prepared by TFDS.
    """
    return Experiment(
        model=pixelcnn.Config(
            **FASHION_IMAGE, mixtures=10, width=128, depth=12, kernel=5, dropout=0.2, dtype="bfloat16"
        ),
        data=replace(FASHION_MNIST, fields=FLIPPED),
        training=replace(SMALL, steps=40_000, checkpoint_every=2000),
    )


def pixelcnn_cifar10() -> Experiment:
    """The largest Gated PixelCNN of 1606.05328 (section 3.1): 20 layers of 384 features, windows of 5x5.

    The paper states that size for 32x32 ImageNet; of CIFAR-10 it reports 3.03 bits/dim, and PixelCNN++ (1701.05517),
    whose mixture of ten logistics and dropout of a half these are, 2.92. Needs cifar10 prepared by TFDS.
    """
    return Experiment(
        model=pixelcnn.Config(image_size=32, mixtures=10, width=384, depth=20, kernel=5, dropout=0.5, dtype="bfloat16"),
        data=replace(CIFAR10, train="train[:95%]", validation="train[95%:]", fields=FLIPPED),
        training=Training(
            optimizer=Optimizer(learning_rate=1e-3, warmup_steps=1000, b1=0.95, b2=0.9995),
            ema_decay=0.9995,
            steps=200_000,
            batch_size=128,
            log_every=100,
            checkpoint_every=5000,
        ),
    )


PRESETS = (pixelcnn_tiny, pixelcnn_fashion_mnist, pixelcnn_cifar10)
