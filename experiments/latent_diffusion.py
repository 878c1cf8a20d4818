"""Latent diffusion: a prior of what an autoencoder makes of images, told captions or classes."""

from dataclasses import replace
from typing import Any

from experiments.autoencoder import autoencoder_tiny, autoencoder_tiny_digits
from experiments.clip import clip_small
from experiments.data import DIGITS, OPENMOJI, TINY, TINY_OPTIMIZER
from vlm_jax.data import Caption, Data, Image, Text
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder, clip, diffusion, latent_diffusion, probability_flow, text_encoder, vdm
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.dit import DiT
from vlm_jax.nn.pixart import PixArt
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import SD15, LatentUNet, UNet
from vlm_jax.start import Start
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

CAPTIONED = replace(OPENMOJI, text=Text(vocab_size=2048))
READER = text_encoder.Config(network=clip_small().model.text)
"""The text tower of `clip-small`."""


def read_by(tower: str, into: str) -> Start:
    """The text tower of a CLIP as the reader of a model."""
    return Start(workdir=tower, take="text", into=f"{into}/network", leave=("projection",))


def latent_diffusion_tiny() -> Experiment:
    """Emoji of their names, 64x64: a rectified flow of the latents of `autoencoder-tiny`, told by `clip-small`.

    Needs both runs; 32 minutes on two CPU cores. `python -m tools.evaluate runs/latent-diffusion-tiny --judge
    runs/clip-judge-a runs/clip-judge-b`: of 400 held-out captions 26.8% and 25.3% are among the ten nearest to their
    drawing, where they are among those of the real one for 35.5% and 37.0%.
    """
    backbone = LatentUNet(widths=(96, 192), blocks=1, attention=(8,), heads=4, groups=16, dropout=0.1)
    return Experiment(
        model=latent_diffusion.Config(
            first=autoencoder_tiny().model,
            prior=probability_flow.Config(
                image_size=16, channels=4, levels=None, network=Network(backbone=backbone), text=READER
            ),
        ),
        sampling=probability_flow.Sampling(steps=25, guidance=3.0),
        data=CAPTIONED,
        training=replace(
            TINY,
            optimizer=replace(TINY_OPTIMIZER, learning_rate=1e-3, warmup_steps=100),
            steps=800,
            batch_size=64,
        ),
        start=(Start(workdir="runs/autoencoder-tiny", into="first"), read_by("runs/clip-small", "prior/text")),
        frozen=(r"^first/", r"^prior/text/"),
        cached=True,
    )


def latent_diffusion_tiny_digits() -> Experiment:
    """Variational diffusion of the latents of `autoencoder-tiny-digits`, which is needed: both bounds in one."""
    backbone = UNet(widths=(64,), blocks=2, groups=8, dropout=0.1)
    return Experiment(
        model=latent_diffusion.Config(
            first=autoencoder_tiny_digits().model,
            prior=vdm.Config(
                image_size=4,
                channels=4,
                levels=None,
                network=Network(backbone=backbone),
                predict="v",
                gamma_min=-8.0,
                schedule="monotone",
                fourier=(),
            ),
        ),
        sampling=vdm.Sampling(steps=100),
        data=DIGITS,
        training=TINY,
        start=(Start(workdir="runs/autoencoder-tiny-digits", into="first"),),
        frozen=(r"^first/",),
        cached=True,
    )


FIRST = replace(autoencoder.SD_VAE, objective=None)
"""Stable Diffusion's autoencoder, for images of 256 pixels of 32x32 latents."""
SD_FIRST = Start(workdir="runs/sd-vae", into="first", leave=(r"^first/objective/",))
"""Its run, converted or trained, without the critic."""


def dit(width: int, depth: int, heads: int, *, steps: int = 400_000, guidance: float = 1.0) -> Experiment:
    """A published size and schedule (2212.09748, table 1 and section 4), on ImageNet at 256 pixels."""
    transformer = Transformer(width=width, depth=depth, heads=heads, mlp=4 * width, dtype="bfloat16")
    return Experiment(
        model=latent_diffusion.Config(
            first=FIRST,
            prior=diffusion.Config(
                image_size=32,
                channels=4,
                levels=None,
                network=Network(backbone=DiT(patch_size=2, transformer=transformer), classes=1000),
                variance="learned",
            ),
        ),
        sampling=diffusion.Sampling(steps=250, guidance=guidance),
        data=Data(name="imagenet2012", test="validation"),
        training=Training(
            optimizer=Optimizer(learning_rate=1e-4, schedule="constant", clip_norm=None),
            ema_decay=0.9999,
            steps=steps,
            batch_size=256,
            checkpoint_every=10_000,
        ),
        start=(SD_FIRST,),
        frozen=(r"^first/",),
    )


def dit_s2() -> Experiment:
    """DiT-S/2 (2212.09748, table 4): 33M parameters, FID-50K 68.4 after 400,000 steps, without guidance.

    Needs imagenet2012 prepared by TFDS, and Stable Diffusion's autoencoder in runs/sd-vae (`tools.convert`). The paper
    mirrors half of its images; `--cached` takes them as they are, and encodes each once.
    """
    return dit(384, 12, 6)


def dit_b2() -> Experiment:
    """DiT-B/2 (2212.09748, table 4): 130M parameters, FID-50K 43.5 after 400,000 steps; in all else as S/2."""
    return dit(768, 12, 12)


def dit_l2() -> Experiment:
    """DiT-L/2 (2212.09748, table 4): 458M parameters, FID-50K 23.3 after 400,000 steps; in all else as S/2."""
    return dit(1024, 24, 16)


def dit_xl2() -> Experiment:
    """DiT-XL/2 (2212.09748, table 4): 675M parameters, FID-50K 2.27 with guidance 1.5 after 7M steps; as S/2."""
    return dit(1152, 28, 16, steps=7_000_000, guidance=1.5)


def captioned(
    first: autoencoder.Config,
    backbone: LatentUNet | PixArt,
    reader: text_encoder.Config,
    starts: tuple[Start, ...],
    training: Training,
    **prior: Any,
) -> Experiment:
    """A published model that is told captions, of a data set of them that TFDS has prepared."""
    side, channels = first.latents[0], first.latents[2]
    shape: dict[str, Any] = {"image_size": side, "channels": channels, "levels": None}
    return Experiment(
        model=latent_diffusion.Config(
            first=first,
            prior=diffusion.Config(**shape, network=Network(backbone=backbone), text=reader, **prior),
        ),
        data=Data(
            name="coco_captions",
            test="val",
            fields=(Image(), Caption()),
            text=Text(vocab_size=reader.network.vocab_size),
        ),
        training=training,
        start=(SD_FIRST, *starts),
        frozen=(r"^first/", r"^prior/text/"),
        frozen_dtype="bfloat16",
    )


def sd15() -> Experiment:
    """Stable Diffusion 1.5 (2112.10752; its model card): a U-Net of 859,520,964 parameters, at 512 pixels.

    The last stage of its training, on 2,048 images a step at 1e-4 after 10,000 steps of warm-up, a tenth of the
    captions left out. What is read where none is told is learned, where the release has the empty caption. Needs
    Stable Diffusion's autoencoder in runs/sd-vae and CLIP ViT-L/14 in runs/clip-vit-l14 (`tools.convert`), a captioned
    data set (--data.name) and --mesh.fsdp.
    """
    reader = text_encoder.Config(network=clip.CLIP_VIT_L14.text)
    training = Training(
        optimizer=Optimizer(learning_rate=1e-4, schedule="constant", warmup_steps=10_000, weight_decay=0.01),
        ema_decay=0.9999,
        steps=595_000,
        batch_size=2048,
        checkpoint_every=2000,
    )
    experiment = captioned(
        replace(FIRST, image_size=512),
        replace(SD15, dtype="bfloat16"),
        reader,
        (read_by("runs/clip-vit-l14", "prior/text"),),
        training,
        betas="scaled_linear",
    )
    return replace(experiment, sampling=diffusion.Sampling(solver="ddim", steps=50, guidance=7.5))


def pixart_xl2() -> Experiment:
    """PixArt-alpha XL/2 at 256 pixels (2310.00426): 0.6B parameters, told by T5 v1.1 XXL in 120 tokens.

    AdamW of 2e-5, decay 0.03, eps 1e-10 and gradients clipped at 0.01, as the release's `PixArt_xl2_img256_internal`.
    Needs Stable Diffusion's autoencoder in runs/sd-vae and T5 in runs/t5-v1_1-xxl (`tools.convert`).
    """
    transformer = Transformer(width=1152, depth=28, heads=16, mlp=4608, dtype="bfloat16")
    reader = text_encoder.Config(network=replace(text_encoder.T5_V1_1_XXL, context_length=120))
    optimizer = Optimizer(
        learning_rate=2e-5, schedule="constant", warmup_steps=1000, weight_decay=0.03, eps=1e-10, clip_norm=0.01
    )
    experiment = captioned(
        FIRST,
        PixArt(patch_size=2, transformer=transformer),
        reader,
        (Start(workdir="runs/t5-v1_1-xxl", into="prior/text"),),
        Training(optimizer=optimizer, ema_decay=0.9999, steps=220_000, batch_size=704, checkpoint_every=2000),
        variance="learned",
    )
    return replace(experiment, sampling=diffusion.Sampling(solver="dpm_solver", steps=20, guidance=4.5))


PRESETS = (latent_diffusion_tiny, latent_diffusion_tiny_digits, dit_s2, dit_b2, dit_l2, dit_xl2, sd15, pixart_xl2)
