"""Autoencoders with a map of latents: the first stage of latent diffusion."""

from dataclasses import replace
from typing import Any

from experiments.data import DIGITS, DIGITS_IMAGE, OPENMOJI, TINY, TINY_OPTIMIZER
from vlm_jax.data import Data, Image
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder, clip
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.start import Start
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def autoencoder_tiny() -> Experiment:
    """Emoji, 64x64: a latent of 4 channels for each square of 4x4 pixels.

    23 minutes on two CPU cores, with tests beside. `python -m tools.evaluate runs/autoencoder-tiny --judge
    runs/clip-judge-a runs/clip-judge-b`: copies of held-out emoji have a PSNR of 27.5 dB where as many principal
    components have 20.2, and a SSIM of 0.964; of the captions that find their own drawing first 81% and 85% still find
    its copy.
    """
    return Experiment(
        model=autoencoder.Config(
            image_size=64,
            network=Pyramid(widths=(16, 32, 64), blocks=1, groups=8),
            objective=autoencoder.Bound(kl_weight=0.1),
        ),
        data=OPENMOJI,
        training=replace(TINY, optimizer=replace(TINY_OPTIMIZER, warmup_steps=100), steps=750, batch_size=32),
    )


def autoencoder_tiny_digits() -> Experiment:
    """Handwritten digits, 8x8: a latent of 4 channels for each square of 2x2 pixels; minutes on a CPU."""
    network = Pyramid(widths=(32, 64), blocks=1, groups=8, dropout=0.1)
    return Experiment(
        model=autoencoder.Config(**DIGITS_IMAGE, network=network, objective=autoencoder.Bound(kl_weight=0.5)),
        data=DIGITS,
        training=TINY,
    )


JUDGE = replace(clip.CLIP_VIT_B16.image, image_size=256, mean=clip.OPENAI_MEAN, std=clip.OPENAI_STD, features=6)
"""OpenAI's CLIP ViT-B/16, half of whose blocks are looked through. It stands where the releases have LPIPS, for there
is no VGG here."""


def judged(model: Any, goal: Adversarial, image: Image, training: Training) -> Experiment:
    """A first stage of ImageNet whose copies a critic and `JUDGE` look at.

    The judge is that of a converted CLIP (`tools.convert` of openai/clip-vit-base-patch16, to --start.0.workdir), whose
    positions are resized.
    """
    return Experiment(
        model=replace(model, objective=replace(goal, judge=JUDGE)),
        data=Data(name="imagenet2012", test="validation", fields=(image,)),
        training=training,
        start=(Start(workdir="runs/openai-clip-vit-b16", take="image", into="objective/judge"),),
        frozen=(r"^objective/judge/",),
        frozen_dtype="bfloat16",
    )


def kl(model: autoencoder.Config, steps: int) -> Experiment:
    """As CompVis's `configs/autoencoder` for ImageNet: a rate of 4.5e-6 for each image of a batch, which are two of 12.

    Adam of (0.5, 0.9), the release's for both networks; the critic's weight is 0.5 from step 50,001 on, that of the
    divergence 1e-6. Crops keep at least half of the shorter side. Trained for as long as the model of the zoo.
    """
    optimizer = Optimizer(learning_rate=24 * 4.5e-6, schedule="constant", b1=0.5, b2=0.9, clip_norm=None)
    training = Training(optimizer=optimizer, steps=steps, batch_size=24, log_every=50, checkpoint_every=2000)
    return judged(model, Adversarial(), Image(crop_min_area=0.25), training)


def autoencoder_kl_f4() -> Experiment:
    """KL-f4 (2112.10752, table 8; `autoencoder_kl_64x64x3`): 55.3M parameters, rFID 0.27, PSNR 27.5 on ImageNet.

    Those of the zoo, which were trained on OpenImages with LPIPS for a judge. Needs imagenet2012 prepared by TFDS, and
    a run of OpenAI's CLIP ViT-B/16 in runs/openai-clip-vit-b16 (`tools.convert`).
    """
    return kl(autoencoder.KL_F4, 176_991)


def autoencoder_kl_f8() -> Experiment:
    """KL-f8 (2112.10752, table 8; `autoencoder_kl_32x32x4`): 83.7M parameters, rFID 0.90, PSNR 24.2; else as f4.

    The first stage of Stable Diffusion 1, whose weights are read by `tools.convert`.
    """
    return kl(autoencoder.SD_VAE, 246_803)


def autoencoder_kl_f16() -> Experiment:
    """KL-f16 (2112.10752, table 8; `autoencoder_kl_16x16x16`): 69.6M parameters, rFID 0.87, PSNR 24.1; else as f4."""
    return kl(autoencoder.KL_F16, 442_998)


PRESETS = (autoencoder_tiny, autoencoder_tiny_digits, autoencoder_kl_f4, autoencoder_kl_f8, autoencoder_kl_f16)
