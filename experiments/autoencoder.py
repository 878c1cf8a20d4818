"""Autoencoders with a map of latents: the first stage of latent diffusion."""

from dataclasses import replace

from experiments.data import OPENMOJI, TINY, TINY_OPTIMIZER
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder
from vlm_jax.nn.autoencoder import Pyramid


def autoencoder_tiny() -> Experiment:
    """Emoji, 64x64: a latent of 4 channels for each square of 4x4 pixels; minutes on a CPU."""
    return Experiment(
        model=autoencoder.Config(image_size=64, network=Pyramid(widths=(16, 32, 64), blocks=1, groups=8)),
        data=OPENMOJI,
        training=replace(TINY, optimizer=replace(TINY_OPTIMIZER, warmup_steps=100), steps=1000, batch_size=32),
    )


PRESETS = (autoencoder_tiny,)
