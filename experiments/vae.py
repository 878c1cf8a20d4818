"""Variational autoencoders."""

from dataclasses import replace

from experiments.data import DIGITS, DIGITS_IMAGE, FASHION_IMAGE, FASHION_MNIST, OPENMOJI, TINY, TINY_OPTIMIZER
from vlm_jax.experiment import Experiment
from vlm_jax.models import vae

OPTIMIZER = replace(TINY_OPTIMIZER, warmup_steps=100)


def vae_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels; two minutes on a CPU."""
    return Experiment(
        model=vae.Config(**DIGITS_IMAGE, latent=16, widths=(32, 64), dropout=0.1),
        data=DIGITS,
        training=TINY,
    )


def vae_tiny_openmoji() -> Experiment:
    """Emoji, 32x32, 256 levels, a prior of pseudo-inputs; half an hour on two CPU cores."""
    return Experiment(
        model=vae.Config(image_size=32, latent=64, pseudo_inputs=256, widths=(16, 32, 64)),
        data=OPENMOJI,
        training=replace(TINY, optimizer=OPTIMIZER, steps=1500, batch_size=64, checkpoint_every=250),
    )


def vae_fashion_mnist() -> Experiment:
    """Fashion-MNIST, 28x28, 256 levels; an hour on two CPU cores."""
    return Experiment(
        model=vae.Config(**FASHION_IMAGE, latent=64, widths=(32, 64, 128), dropout=0.1),
        data=FASHION_MNIST,
        training=replace(TINY, optimizer=OPTIMIZER, ema_decay=0.998, steps=6000, batch_size=64, checkpoint_every=500),
    )


PRESETS = (vae_tiny, vae_tiny_openmoji, vae_fashion_mnist)
