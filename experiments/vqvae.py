"""Autoencoders whose latents are codes: tokenizers of images."""

from dataclasses import replace

from experiments.data import OPENMOJI, TINY, TINY_OPTIMIZER
from vlm_jax.experiment import Experiment
from vlm_jax.models import vqvae
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.quantize import EMA


def vqvae_tiny() -> Experiment:
    """Emoji, 64x64: one of 512 codes for each square of 8x8 pixels; minutes on a CPU."""
    return Experiment(
        model=vqvae.Config(
            image_size=64,
            network=Pyramid(widths=(16, 32, 64, 64), blocks=1, groups=8),
            hidden=64,
            quantizer=EMA(size=512, width=16),
        ),
        data=OPENMOJI,
        training=replace(TINY, optimizer=replace(TINY_OPTIMIZER, warmup_steps=100), steps=1000, batch_size=32),
    )


PRESETS = (vqvae_tiny,)
