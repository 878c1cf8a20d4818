"""Diffusion models: variational diffusion, DDPM, rectified flow."""

from vlm_jax.data import Data
from vlm_jax.experiment import Experiment
from vlm_jax.models import diffusion, probability_flow, vdm
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.dit import DiT
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import UNet
from vlm_jax.train.optim import Optimizer

DIGITS = Data(name="digits", validation="validation", image_size=8, channels=1)
TINY_UNET = UNet(widths=(32, 64), blocks=1, groups=8, dropout=0.1)
TINY_OPTIMIZER = Optimizer(learning_rate=2e-3, warmup_steps=50, weight_decay=0.01, eps=1e-6)


def diffusion_tiny() -> Experiment:
    """Variational diffusion of handwritten digits, 8x8, 17 levels; four minutes on two CPU cores."""
    return Experiment(
        model=vdm.Config(
            image_size=8,
            channels=1,
            levels=17,
            network=Network(unet=TINY_UNET),
            predict="v",
            gamma_min=-8.0,
            fourier=(0, 1, 2),
            sampling_steps=100,
        ),
        data=DIGITS,
        optimizer=TINY_OPTIMIZER,
        ema_decay=0.995,
        steps=1000,
        batch_size=128,
        checkpoint_every=200,
    )


def diffusion_tiny_ddpm() -> Experiment:
    """Improved DDPM of handwritten digits in 200 steps, told the class; four minutes on two CPU cores."""
    return Experiment(
        model=diffusion.Config(
            image_size=8,
            channels=1,
            levels=17,
            network=Network(unet=TINY_UNET, classes=10),
            timesteps=200,
            betas="cosine",
            predict="v",
            variance="learned",
            sampling_steps=100,
            guidance=1.5,
        ),
        data=DIGITS,
        optimizer=TINY_OPTIMIZER,
        ema_decay=0.995,
        steps=1000,
        batch_size=128,
        checkpoint_every=200,
    )


def diffusion_tiny_flow() -> Experiment:
    """Rectified flow of handwritten digits with a diffusion transformer, told the class; minutes on a CPU."""
    transformer = Transformer(width=96, depth=4, heads=4, mlp=384, dropout=0.1)
    return Experiment(
        model=probability_flow.Config(
            image_size=8,
            channels=1,
            levels=17,
            network=Network(dit=DiT(patch_size=2, transformer=transformer), classes=10),
            guidance=1.5,
        ),
        data=DIGITS,
        optimizer=TINY_OPTIMIZER,
        ema_decay=0.995,
        steps=2000,
        batch_size=128,
        checkpoint_every=200,
    )


PRESETS = (diffusion_tiny, diffusion_tiny_ddpm, diffusion_tiny_flow)
