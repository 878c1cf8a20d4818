"""Diffusion models: variational diffusion, DDPM, rectified flow."""

from dataclasses import replace

from experiments.data import (
    CIFAR10,
    DIGITS,
    DIGITS_IMAGE,
    FASHION_IMAGE,
    FASHION_MNIST,
    FLIPPED,
    OPENMOJI,
    SMALL,
    TINY,
    TINY_OPTIMIZER,
)
from experiments.latent_diffusion import CAPTIONED, READER, read_by
from vlm_jax.experiment import Experiment
from vlm_jax.models import diffusion, probability_flow, vdm
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.dit import DiT
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import LatentUNet, UNet
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

TINY_UNET = UNet(widths=(32, 64), blocks=1, groups=8, dropout=0.1)


def diffusion_tiny() -> Experiment:
    """Variational diffusion of handwritten digits, 8x8, 17 levels; four minutes on two CPU cores."""
    return Experiment(
        model=vdm.Config(
            **DIGITS_IMAGE,
            network=Network(backbone=TINY_UNET),
            predict="v",
            gamma_min=-8.0,
            schedule="monotone",
            fourier=(0, 1, 2),
        ),
        sampling=vdm.Sampling(steps=100),
        data=DIGITS,
        training=TINY,
    )


def diffusion_tiny_ddpm() -> Experiment:
    """Improved DDPM of handwritten digits in 200 steps, told the class; four minutes on two CPU cores."""
    return Experiment(
        model=diffusion.Config(
            **DIGITS_IMAGE,
            network=Network(backbone=TINY_UNET, classes=10),
            timesteps=200,
            betas="cosine",
            predict="v",
            variance="learned",
        ),
        sampling=diffusion.Sampling(steps=100, guidance=1.5),
        data=DIGITS,
        training=TINY,
    )


def diffusion_tiny_flow() -> Experiment:
    """Rectified flow of handwritten digits with a diffusion transformer, told the class; minutes on a CPU."""
    transformer = Transformer(width=96, depth=4, heads=4, mlp=384, dropout=0.1)
    return Experiment(
        model=probability_flow.Config(
            **DIGITS_IMAGE,
            network=Network(backbone=DiT(patch_size=2, transformer=transformer), classes=10),
        ),
        sampling=probability_flow.Sampling(guidance=1.5),
        data=DIGITS,
        training=replace(TINY, steps=2000),
    )


def diffusion_fashion_mnist() -> Experiment:
    """Variational diffusion of Fashion-MNIST, 28x28, 256 levels; a day and a half on two CPU cores."""
    return Experiment(
        model=vdm.Config(
            **FASHION_IMAGE,
            network=Network(backbone=UNet(widths=(64, 128), blocks=2, groups=16, dropout=0.1)),
            predict="v",
            schedule="monotone",
        ),
        sampling=vdm.Sampling(steps=250),
        data=replace(FASHION_MNIST, fields=FLIPPED),
        training=replace(SMALL, log_every=10),
    )


def diffusion_ddpm_cifar10() -> Experiment:
    """DDPM on CIFAR-10 (2006.11239, appendix B): 35.7M parameters, FID 3.17, at most 3.75 bits/dim with this loss.

    Needs cifar10 prepared by TFDS.
    """
    return Experiment(
        model=diffusion.Config(
            image_size=32,
            network=Network(backbone=UNet(widths=(128, 256, 256, 256), blocks=2, attention=(16,), dropout=0.1)),
            variance="forward",
        ),
        sampling=diffusion.Sampling(solver="ancestral", steps=1000),
        data=replace(CIFAR10, fields=FLIPPED),
        training=Training(
            optimizer=Optimizer(learning_rate=2e-4, schedule="constant", warmup_steps=5000),
            ema_decay=0.9999,
            steps=800_000,
            batch_size=128,
            checkpoint_every=10_000,
        ),
    )


def diffusion_vdm_cifar10() -> Experiment:
    """VDM on CIFAR-10 (2107.00630, section 6 and appendix B): 2.65 bits/dim without augmentation, after 10M steps.

    The network keeps the resolution: 32 blocks of width 128 down and 33 up. The schedule is the paper's monotone
    network, where the release's configuration learns its ends alone. Needs cifar10 prepared by TFDS.
    """
    return Experiment(
        model=vdm.Config(
            image_size=32,
            network=Network(backbone=UNet(widths=(128,), blocks=32, dropout=0.1)),
            schedule="monotone",
        ),
        sampling=vdm.Sampling(steps=1000),
        data=CIFAR10,
        training=Training(
            optimizer=Optimizer(
                learning_rate=2e-4, schedule="constant", warmup_steps=100, b2=0.99, weight_decay=0.01, clip_norm=None
            ),
            ema_decay=0.9999,
            steps=10_000_000,
            batch_size=128,
            checkpoint_every=10_000,
        ),
    )


def text_to_image_tiny() -> Experiment:
    """Emoji of their names, 64x64, in pixels: a rectified flow whose network predicts the image, told by `clip-small`.

    Needs that run; 65 minutes on two CPU cores, with tests beside. A U-Net, thin where it is fine, paints no borders of
    patches. `python -m tools.evaluate runs/text-to-image-tiny --judge runs/clip-judge-a runs/clip-judge-b`: of 400
    held-out captions 19.8% and 17.0% are among the ten nearest to their drawing, where they are among those of the real
    one for 35.5% and 37.0%.
    """
    backbone = LatentUNet(widths=(16, 32, 96, 192), blocks=1, attention=(8,), heads=4, groups=8, dropout=0.1)
    return Experiment(
        model=probability_flow.Config(
            image_size=64,
            network=Network(backbone=backbone),
            predict="x",
            logit_normal=(0.8, 0.8),
            shift=0.5,
            text=READER,
        ),
        sampling=probability_flow.Sampling(steps=25, guidance=3.0),
        data=CAPTIONED,
        training=replace(
            TINY,
            optimizer=replace(TINY_OPTIMIZER, learning_rate=1e-3, warmup_steps=100),
            steps=700,
            batch_size=64,
        ),
        start=(read_by("runs/clip-small", "text"),),
        frozen=(r"^text/",),
    )


def diffusion_tiny_patches() -> Experiment:
    """Emoji, 32x32, in patches of 4: a transformer predicts the image itself, as JiT (2511.13720); minutes on a CPU.

    To be compared with `--model.predict velocity` and `eps`, and all three with those of patches of 16
    (`--model.network.backbone.patch-size 16`), which have six times as many numbers as the network is wide. After 400
    steps the Fréchet distances by `clip-judge-a` and `-b` are 0.22 and 0.23 of the image, 0.35 and 0.44 of the
    velocity, 0.54 and 0.60 of the noise; in patches of 16 0.46 and 0.43, 1.32 and 1.38, 1.56 and 1.66.
    """
    transformer = Transformer(width=128, depth=4, heads=4, mlp=512)
    return Experiment(
        model=probability_flow.Config(
            image_size=32,
            network=Network(backbone=DiT(patch_size=4, transformer=transformer)),
            predict="x",
            logit_normal=(0.8, 0.8),
        ),
        data=OPENMOJI,
        training=replace(TINY, optimizer=replace(TINY_OPTIMIZER, warmup_steps=100), batch_size=64),
    )


PRESETS = (
    diffusion_tiny,
    diffusion_tiny_ddpm,
    diffusion_tiny_flow,
    diffusion_fashion_mnist,
    diffusion_ddpm_cifar10,
    diffusion_vdm_cifar10,
    text_to_image_tiny,
    diffusion_tiny_patches,
)
