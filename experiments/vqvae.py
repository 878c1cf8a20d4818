"""Autoencoders whose latents are codes: tokenizers of images."""

from dataclasses import replace

from experiments.autoencoder import judged
from experiments.data import DIGITS, DIGITS_IMAGE, OPENMOJI, TINY, TINY_OPTIMIZER
from vlm_jax.data import Data, Image
from vlm_jax.experiment import Experiment
from vlm_jax.models import vqvae
from vlm_jax.nn.adversary import Adversarial
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.quantize import EMA
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def vqvae_tiny() -> Experiment:
    """Emoji, 64x64: one of 512 codes for each square of 8x8 pixels; 17 minutes on two CPU cores.

    `python -m tools.evaluate runs/vqvae-tiny --judge runs/clip-judge-a runs/clip-judge-b`: copies of held-out emoji
    have a PSNR of 20.1 dB where as many principal components have 12.9, and a SSIM of 0.863; all codes are in use; of
    the captions that find their own drawing first 55% and 50% still find its copy.
    """
    return Experiment(
        model=vqvae.Config(
            image_size=64,
            network=Pyramid(widths=(16, 32, 64, 64), blocks=1, groups=8),
            hidden=64,
            quantizer=EMA(size=512, width=16),
        ),
        data=OPENMOJI,
        training=replace(TINY, optimizer=replace(TINY_OPTIMIZER, warmup_steps=100), steps=600, batch_size=32),
    )


def vqvae_tiny_digits() -> Experiment:
    """Handwritten digits, 8x8: one of 64 codes for each square of 2x2 pixels; minutes on a CPU."""
    return Experiment(
        model=vqvae.Config(
            **DIGITS_IMAGE,
            network=Pyramid(widths=(32, 64), blocks=1, groups=8, dropout=0.1),
            hidden=64,
            quantizer=EMA(size=64, width=8),
        ),
        data=DIGITS,
        training=TINY,
    )


def vqvae_imagenet() -> Experiment:
    """VQ-VAE of ImageNet (1711.00937, section 4.2): 128x128 pixels, one of 512 codes for each square of 4x4.

    Codes are moving averages (appendix A.1) and none is restarted; Adam of 2e-4, 128 images, 250,000 steps (section
    4.1). The networks are later ones, with 256 features where they are narrowest as there, and the codes have 64, as in
    DeepMind's Sonnet: 15.0M parameters. Needs imagenet2012 prepared by TFDS.
    """
    return Experiment(
        model=vqvae.Config(
            image_size=128,
            network=Pyramid(widths=(64, 128, 256)),
            quantizer=EMA(size=512, width=64, restart=0.0),
        ),
        data=Data(name="imagenet2012", test="validation", fields=(Image(),)),
        training=Training(
            optimizer=Optimizer(learning_rate=2e-4, schedule="constant", clip_norm=None),
            steps=250_000,
            batch_size=128,
            log_every=50,
            checkpoint_every=2000,
        ),
    )


def vqgan(model: vqvae.Config, goal: Adversarial) -> Experiment:
    """As the release's `imagenet_vqgan`: 4.5e-6 for each image of a batch of 12, Adam of (0.5, 0.9).

    How long it was trained is not told; the release crops at random where these crop at the centre.
    """
    optimizer = Optimizer(learning_rate=12 * 4.5e-6, schedule="constant", b1=0.5, b2=0.9, clip_norm=None)
    training = Training(optimizer=optimizer, steps=500_000, batch_size=12, log_every=50, checkpoint_every=2000)
    return judged(model, goal, Image(), training)


def vqgan_f16() -> Experiment:
    """VQGAN of ImageNet (2012.09841): 1024 codes of 256 features, 72.1M parameters, rFID 7.94 by the release's table.

    The critic's weight is 0.8 from step 250,001 on. Needs imagenet2012 prepared by TFDS, and a run of OpenAI's CLIP
    ViT-B/16 in runs/openai-clip-vit-b16 (`tools.convert`), which is the judge in the place of LPIPS.
    """
    return vqgan(vqvae.VQGAN_F16, Adversarial(adversarial=0.8, start=250_001))


def vqgan_f16_16384() -> Experiment:
    """VQGAN of ImageNet with 16,384 codes: 76.1M parameters, rFID 4.98 by the release's table; else as `vqgan-f16`.

    By the settings beside the released weights: a critic of smaller patches, of weight 0.75 from the beginning on.
    """
    goal = Adversarial(widths=(64, 128, 256), adversarial=0.75, start=0)
    return vqgan(vqvae.VQGAN_F16_16384, goal)


def llamagen(model: vqvae.Config) -> Experiment:
    """As 2406.06525, section 3.1, and the release's `vq_train.py`: 40 epochs, whose last, smaller batch is dropped.

    The paper's decay of 0.05 is not in the release and not here. The release squares the error of a sub-pixel, which is
    absolute here, and does not balance the critic's weight of 0.5 with it.
    """
    optimizer = Optimizer(learning_rate=1e-4, schedule="constant", b1=0.9, b2=0.95, clip_norm=1.0)
    training = Training(optimizer=optimizer, steps=400_360, batch_size=128, log_every=50, checkpoint_every=2000)
    model = replace(model, network=replace(model.network, dtype="bfloat16"))
    return judged(model, Adversarial(start=20_000), Image(crop_min_area=0.64, flip=True), training)


def llamagen_tokenizer_f16() -> Experiment:
    """LlamaGen's VQ-16 (2406.06525): 16,384 codes of 8 features of unit length, 71.9M parameters, rFID 2.19.

    Needs what `vqgan-f16` does.
    """
    return llamagen(vqvae.LLAMAGEN_F16)


def llamagen_tokenizer_f8() -> Experiment:
    """LlamaGen's VQ-8: 32x32 codes, 70.1M parameters, rFID 0.59; else as `llamagen-tokenizer-f16`."""
    return llamagen(vqvae.LLAMAGEN_F8)


PRESETS = (
    vqvae_tiny,
    vqvae_tiny_digits,
    vqvae_imagenet,
    vqgan_f16,
    vqgan_f16_16384,
    llamagen_tokenizer_f16,
    llamagen_tokenizer_f8,
)
