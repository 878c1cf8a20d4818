"""Autoregressive image transformers."""

from dataclasses import replace

from experiments.data import (
    CIFAR10,
    DIGITS,
    DIGITS_IMAGE,
    FASHION_IMAGE,
    FASHION_MNIST,
    FLIPPED,
    OPENMOJI,
    TINY,
    TINY_OPTIMIZER,
)
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoregressive
from vlm_jax.nn.transformer import Transformer
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

OPTIMIZER = replace(TINY_OPTIMIZER, warmup_steps=100, weight_decay=0.05)


def autoregressive_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels, pixel after pixel; minutes on a CPU."""
    return Experiment(
        model=autoregressive.Config(
            **DIGITS_IMAGE,
            transformer=Transformer(width=96, depth=3, heads=4, mlp=384, dropout=0.1, scan=False),
        ),
        data=DIGITS,
        training=replace(
            TINY, optimizer=replace(OPTIMIZER, warmup_steps=50), steps=600, batch_size=64, checkpoint_every=100
        ),
    )


def autoregressive_tiny_openmoji() -> Experiment:
    """Emoji, 32x32, 256 levels, in patches of 2x2 pixels; an hour on two CPU cores."""
    return Experiment(
        model=autoregressive.Config(
            image_size=32,
            patch_size=2,
            transformer=Transformer(width=128, depth=4, heads=4, mlp=512, scan=False),
        ),
        data=OPENMOJI,
        training=replace(TINY, optimizer=OPTIMIZER, steps=5000, batch_size=16, checkpoint_every=250),
    )


def autoregressive_fashion_mnist() -> Experiment:
    """Fashion-MNIST, 28x28, 256 levels, in patches of 2x2 pixels; an hour on two CPU cores."""
    return Experiment(
        model=autoregressive.Config(
            **FASHION_IMAGE,
            patch_size=2,
            transformer=Transformer(width=128, depth=4, heads=4, mlp=512, dropout=0.1, scan=False),
        ),
        data=FASHION_MNIST,
        training=replace(TINY, optimizer=OPTIMIZER, ema_decay=0.998, steps=6000, batch_size=32, checkpoint_every=500),
    )


def autoregressive_igpt_s() -> Experiment:
    """The transformer of iGPT-S ("Generative Pretraining from Pixels", ICML 2020): 76M parameters, CIFAR-10.

    iGPT reads 32x32 pixels in a palette of 512 colours and states no bits/dim. This one reads their 256 levels and has
    ten logistics a pixel, as the Image Transformer (1802.05751, table 4) has, which reaches 2.90 bits/dim.
    Needs cifar10 prepared by TFDS.
    """
    return Experiment(
        model=autoregressive.Config(
            image_size=32,
            mixtures=10,
            transformer=Transformer(width=512, depth=24, heads=8, mlp=2048, dtype="bfloat16", remat="all"),
        ),
        data=replace(CIFAR10, train="train[:95%]", validation="train[95%:]", fields=FLIPPED),
        training=Training(
            optimizer=Optimizer(learning_rate=3e-3, b2=0.95, warmup_steps=10_000, weight_decay=0.0),
            steps=1_000_000,
            batch_size=128,
            log_every=100,
            checkpoint_every=5000,
        ),
    )


PRESETS = (autoregressive_tiny, autoregressive_tiny_openmoji, autoregressive_fashion_mnist, autoregressive_igpt_s)
