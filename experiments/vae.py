"""Variational autoencoders."""

from experiments.data import DIGITS, FASHION_MNIST, OPENMOJI, TINY
from vlm_jax.experiment import Experiment
from vlm_jax.models import vae
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def vae_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels; two minutes on a CPU."""
    return Experiment(
        model=vae.Config(image_size=8, channels=1, levels=17, latent=16, widths=(32, 64), dropout=0.1),
        data=DIGITS,
        training=TINY,
    )


def vae_tiny_openmoji() -> Experiment:
    """Emoji, 32x32, 256 levels, a prior of pseudo-inputs; half an hour on two CPU cores."""
    return Experiment(
        model=vae.Config(image_size=32, latent=64, pseudo_inputs=256, widths=(16, 32, 64)),
        data=OPENMOJI,
        training=Training(
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, weight_decay=0.01, eps=1e-6),
            ema_decay=0.995,
            steps=1500,
            batch_size=64,
            checkpoint_every=250,
        ),
    )


def vae_fashion_mnist() -> Experiment:
    """Fashion-MNIST, 28x28, 256 levels; an hour on two CPU cores."""
    return Experiment(
        model=vae.Config(image_size=28, channels=1, latent=64, widths=(32, 64, 128), dropout=0.1),
        data=FASHION_MNIST,
        training=Training(
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, weight_decay=0.01, eps=1e-6),
            ema_decay=0.998,
            steps=6000,
            batch_size=64,
            checkpoint_every=500,
        ),
    )


PRESETS = (vae_tiny, vae_tiny_openmoji, vae_fashion_mnist)
