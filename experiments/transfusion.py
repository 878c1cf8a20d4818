"""Transfusion: one decoder of texts and of images by diffusion, of latents (2408.11039) and of pixels."""

from dataclasses import replace
from typing import Any

from experiments.autoencoder import autoencoder_kl_f8, autoencoder_tiny
from experiments.data import OPENMOJI, TINY, TINY_OPTIMIZER
from vlm_jax.data import Data, Image, Interleaved, Text, VisualCaption
from vlm_jax.data.conversation import ALONE
from vlm_jax.experiment import Experiment
from vlm_jax.models import language, transfusion
from vlm_jax.models.parts.noised_images import Latents, Pixels
from vlm_jax.nn.decoder import DecoderConfig, SeparateDecoderConfig
from vlm_jax.nn.image_patches import ConvolutionalPatches, LinearPatches, UNetPatches
from vlm_jax.start import Start
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

WORDS = 1024
"""Tokens of the tiny presets' texts."""
LATENTS = Latents(first=autoencoder_tiny().model, patches=LinearPatches(patch_size=2), predict="v")
PIXELS = Pixels(image_size=64, patches=ConvolutionalPatches(patch_size=8, channels=16), shift=0.5, masked_from=900)
READ = VisualCaption(template=ALONE)
"""How a caption is asked for."""


def tiny(image: Latents | Pixels, fields: tuple[Any, ...], **settings: Any) -> Experiment:
    """On emoji and their names, of images that are 64 patches."""
    sizes: dict[str, Any] = {"width": 192, "depth": 6, "heads": 6, "kv_heads": 6, "head_width": 32, "mlp": 512}
    decoder = DecoderConfig(**sizes, qk_norm="rms", dropout=0.1)
    return Experiment(
        model=transfusion.Config(
            image=image,
            language=language.Config(vocab_size=WORDS + 2, context_length=96, eos_id=2, decoder=decoder),
            bos_id=1,
            begin_id=WORDS,
            end_id=WORDS + 1,
            image_weight=0.65,  # 5 times the 0.13 target tokens that there are for a patch
        ),
        data=replace(OPENMOJI, fields=fields, text=Text(vocab_size=WORDS)),
        training=replace(
            TINY,
            optimizer=replace(TINY_OPTIMIZER, learning_rate=1e-3, warmup_steps=100, weight_decay=0.1, b2=0.95),
            steps=1500,
            batch_size=64,
        ),
        **settings,
    )


def transfusion_tiny() -> Experiment:
    """Emoji and their names, 64x64, as the latents of `autoencoder-tiny`, which is needed; draws and reads."""
    return tiny(
        LATENTS,
        (Interleaved(caption_first=0.8), READ),
        sampling=transfusion.Sampling(steps=100, guidance=3.0),
        start=(Start(workdir="runs/autoencoder-tiny", into="image/first"),),
        frozen=(r"^image/first/",),
    )


def pixel_transfusion_tiny() -> Experiment:
    """Emoji and their names, 64x64, without any other model: pixels are read clean, and predicted from noisy ones.

    Half of the documents have the image first, which is then read and not drawn.
    """
    sampling = transfusion.Sampling(solver="heun", steps=25, guidance=3.0)
    return tiny(PIXELS, (Interleaved(caption_first=0.5), READ), sampling=sampling)


def pixel_transfusion_tiny_reader() -> Experiment:
    """The same model on captions of images alone: a reader without an encoder of images."""
    return tiny(PIXELS, (READ,), sampling=transfusion.Sampling(solver="heun", steps=25))


def published(
    image: Latents | Pixels,
    *,
    width: int,
    depth: int,
    heads: int,
    mlp: int,
    steps: int,
    batch_size: int,
    **settings: Any,
) -> Experiment:
    """A published size and schedule (2408.11039, table 1 and section 4.1) on captioned images that TFDS has prepared.

    AdamW of (0.9, 0.95), decay 0.1, gradients clipped at 1, 3e-4 to 1.5e-5 by a cosine after 4,000 steps of warm-up.
    Rows of 4,096 tokens hold as many documents as there is room for, four of five with the caption first. Latents are
    32x32 of 8 channels, as those of its own first stage.
    """
    kind = DecoderConfig if isinstance(image, Latents) else SeparateDecoderConfig
    decoder = kind(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp=mlp,
        dtype="bfloat16",
        remat="all",
    )
    return Experiment(
        model=transfusion.Config(
            image=image,
            language=language.Config(vocab_size=32_002, context_length=4096, eos_id=2, decoder=decoder),
            bos_id=1,
            begin_id=32_000,
            end_id=32_001,
            images=8,
        ),
        data=Data(
            name="coco_captions",
            test="val",
            fields=(Interleaved(caption_first=0.8, image=Image(crop_min_area=1.0)), READ),
            pack=True,
            text=Text(vocab_size=32_000),
        ),
        training=Training(
            optimizer=Optimizer(
                learning_rate=3e-4, final_share=0.05, warmup_steps=4000, weight_decay=0.1, b2=0.95, clip_norm=1.0
            ),
            steps=steps,
            batch_size=batch_size,
            checkpoint_every=5000,
        ),
        **settings,
    )


FIRST = replace(autoencoder_kl_f8().model, latent=8, objective=None)
LINEAR = Latents(first=FIRST, patches=LinearPatches(patch_size=2))
UNET = Latents(first=FIRST, patches=UNetPatches(widths=(640, 1280), blocks=2, groups=32, dtype="bfloat16"))
STAGED: dict[str, Any] = {
    "sampling": transfusion.Sampling(guidance=3.0),
    "start": (Start(workdir="runs/transfusion-autoencoder", into="image/first"),),
    "frozen": (r"^image/first/",),
    "frozen_dtype": "bfloat16",
}
PIXELS_256 = Pixels(image_size=256, patches=ConvolutionalPatches(patch_size=16, bottleneck=128, channels=32))


def transfusion_160m() -> Experiment:
    """Transfusion-0.16B with linear patches (2408.11039, table 1), 0.5 trillion tokens.

    Needs an autoencoder of 8 channels in runs/transfusion-autoencoder and a captioned data set (--data.name).
    """
    return published(LINEAR, width=768, depth=16, heads=12, mlp=2048, steps=250_000, batch_size=512, **STAGED)


def transfusion_760m() -> Experiment:
    """Transfusion-0.76B with linear patches; else as 0.16B."""
    return published(LINEAR, width=1536, depth=24, heads=24, mlp=4096, steps=250_000, batch_size=512, **STAGED)


def transfusion_7b() -> Experiment:
    """Transfusion-7B with the blocks of a U-Net for patches (2408.11039, section 4.4), 2 trillion tokens.

    Needs --mesh.fsdp; else as 0.16B. How wide these blocks are is ours: they have 0.30B parameters.
    """
    return published(UNET, width=4096, depth=32, heads=32, mlp=11_008, steps=500_000, batch_size=1024, **STAGED)


def pixel_transfusion_760m() -> Experiment:
    """Transfusion-0.76B's decoder on pixels of 16x16 patches, as JiT-B/16 reads and predicts them (2511.13720).

    Of a feed-forward layer for texts and one for images, as Tuna-2 (2604.24763). Needs no other run.
    """
    sampling = transfusion.Sampling(solver="heun", steps=50, guidance=3.0)
    sizes: dict[str, Any] = {"width": 1536, "depth": 24, "heads": 24, "mlp": 4096}
    return published(PIXELS_256, **sizes, steps=250_000, batch_size=512, sampling=sampling)


PRESETS = (
    transfusion_tiny,
    pixel_transfusion_tiny,
    pixel_transfusion_tiny_reader,
    transfusion_160m,
    transfusion_760m,
    transfusion_7b,
    pixel_transfusion_760m,
)
