"""Hierarchical variational autoencoders."""

import math
from dataclasses import replace

from experiments.data import CIFAR10, DIGITS, DIGITS_IMAGE, FASHION_IMAGE, FASHION_MNIST, TINY, TINY_OPTIMIZER
from vlm_jax.experiment import Experiment
from vlm_jax.models import ladder_vae
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def ladder_vae_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels, ten latent images; minutes on a CPU."""
    return Experiment(
        model=ladder_vae.Config(
            **DIGITS_IMAGE,
            width=64,
            hidden=32,
            latent=4,
            sizes=(8, 4, 1),
            encoder_blocks=(2, 2, 1),
            decoder_blocks=(4, 4, 2),
            kl_warmup_steps=200,
            dropout=0.1,
        ),
        data=DIGITS,
        training=TINY,
    )


def ladder_vae_fashion_mnist() -> Experiment:
    """Fashion-MNIST, 28x28, 256 levels, fifteen latent images; hours on two CPU cores, minutes on a GPU."""
    return Experiment(
        model=ladder_vae.Config(
            **FASHION_IMAGE,
            width=128,
            hidden=32,
            latent=8,
            sizes=(28, 14, 7, 1),
            encoder_blocks=(2, 3, 2, 1),
            decoder_blocks=(4, 6, 4, 1),
            kl_warmup_steps=1000,
            dropout=0.1,
        ),
        data=FASHION_MNIST,
        training=replace(
            TINY,
            optimizer=replace(TINY_OPTIMIZER, learning_rate=1e-3, warmup_steps=200),
            ema_decay=0.999,
            steps=10_000,
            batch_size=64,
            checkpoint_every=500,
        ),
    )


def ladder_vae_cifar10() -> Experiment:
    """VDVAE on CIFAR-10 (2011.10650, table 2 and the release's settings): 39M parameters, 2.87 bits/dim.

    The release also leaves out updates whose gradient is longer than twice the limit. Needs cifar10 prepared by TFDS.
    """
    return Experiment(
        model=ladder_vae.Config(
            image_size=32,
            width=384,
            hidden=96,
            latent=16,
            sizes=(32, 16, 8, 4, 1),
            encoder_blocks=(12, 7, 7, 4, 3),
            decoder_blocks=(22, 11, 6, 3, 1),
            mixtures=10,
        ),
        data=replace(CIFAR10, train="train[:90%]", validation="train[90%:]"),
        training=Training(
            optimizer=Optimizer(
                learning_rate=2e-4,
                schedule="constant",
                warmup_steps=100,
                b2=0.9,
                weight_decay=0.01,
                clip_norm=200 / math.log(2),  # the release's limit is 200, of a loss in nats
            ),
            ema_decay=0.9999,
            steps=1_100_000,
            batch_size=32,
            log_every=100,
            checkpoint_every=10_000,
        ),
    )


PRESETS = (ladder_vae_tiny, ladder_vae_fashion_mnist, ladder_vae_cifar10)
