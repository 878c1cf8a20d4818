"""The arms of `tools.tradeoff`: a decoder that reads and draws by codes, by latents or by pixels, and one that reads.

All see the same records: emoji and coloured shapes with their captions, and questions about shapes and mosaics. What
draws has of each caption and its image a document in either order; what only reads has the image first. How many steps
each takes is the command's business, which counts FLOPs.
"""

from dataclasses import replace
from typing import Any

from experiments.clip import clip_small
from experiments.data import TINY, TINY_OPTIMIZER
from experiments.transfusion import LATENTS, PIXELS
from experiments.vqvae import vqvae_tiny
from vlm_jax.data import Data, Interleaved, Text, VisualCaption, VisualQuestion
from vlm_jax.data.conversation import ALONE, LINE
from vlm_jax.experiment import Experiment
from vlm_jax.models import chameleon, language, llava, transfusion
from vlm_jax.models.parts.noised_images import CodedPixels
from vlm_jax.models.parts.own_codes import OwnCodes
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.start import Start

WORDS, CODES = 1024, 512
"""Tokens of texts, and of `vqvae-tiny`'s images."""
DECODER = DecoderConfig(width=192, depth=4, heads=6, kv_heads=6, head_width=32, mlp=512, qk_norm="layer", dropout=0.1)
MARKS: dict[str, Any] = {"bos_id": 1, "begin_id": WORDS, "end_id": WORDS + 1}
DRAWN: dict[str, Any] = {**MARKS, "image_weight": 0.65}
"""5 times the 0.13 target tokens that there are for a patch (see `transfusion.Config`)."""
READ = (VisualQuestion(template=LINE), VisualCaption(template=ALONE))
DRAWN_AND_READ = (Interleaved(), VisualQuestion(template=LINE, prompt="<image>{}"), VisualCaption(template=ALONE))
"""What draws is asked as its documents have it: the question on the line of the image."""


def text(tokens: int, context_length: int = 104) -> language.Config:
    """The decoder of all, with a vocabulary of so many, and room up to a multiple of eight."""
    return language.Config(vocab_size=-(-tokens // 8) * 8, context_length=context_length, eos_id=2, decoder=DECODER)


def arm(model: Any, *, draws: bool, **settings: Any) -> Experiment:
    """A model on the records that all arms see."""
    return Experiment(
        model=model,
        data=Data(
            name="openmoji",
            mixture=(("easy_vqa/captions", 2.0), ("easy_vqa", 1.0), ("mosaic", 0.5)),
            train="train[:95%]",
            validation="train[95%:]",
            fields=DRAWN_AND_READ if draws else READ,
            text=Text(vocab_size=WORDS),
        ),
        training=replace(
            TINY,
            optimizer=replace(TINY_OPTIMIZER, learning_rate=1e-3, warmup_steps=50, weight_decay=0.1, b2=0.95),
            ema_decay=0.99,
            steps=1800,
            batch_size=32,
            checkpoint_every=300,
            keep_last=8,
        ),
        **settings,
    )


def tradeoff_reader() -> Experiment:
    """A decoder that reads what the image tower of `clip-small` sees, which is needed, as LLaVA does; draws nothing."""
    return arm(
        llava.Config(vision=replace(clip_small().model.image, features=1), language=text(WORDS)),
        draws=False,
        start=(Start(workdir="runs/clip-small", take="image", into="vision"),),
        frozen=(r"^vision/",),
    )


def tradeoff_chameleon() -> Experiment:
    """A decoder that reads and draws the codes of `vqvae-tiny`, which is needed."""
    return arm(
        chameleon.Config(first=vqvae_tiny().model, language=text(WORDS + 2 + CODES), code_at=WORDS + 2, **MARKS),
        draws=True,
        sampling=chameleon.Sampling(guidance=3.0),
        start=(Start(workdir="runs/vqvae-tiny", into="first"),),
        frozen=(r"^first/",),
    )


def tradeoff_transfusion() -> Experiment:
    """A decoder that reads and draws the latents of `autoencoder-tiny`, which is needed.

    It predicts v: where it predicted the noise, as the paper's, its drawings were noise after as many steps.
    """
    return arm(
        transfusion.Config(image=LATENTS, language=text(WORDS + 2), **DRAWN),
        draws=True,
        sampling=transfusion.Sampling(steps=100, guidance=3.0),
        start=(Start(workdir="runs/autoencoder-tiny", into="image/first"),),
        frozen=(r"^image/first/",),
    )


LATE_MASKED = replace(PIXELS, masked_from=1400)


def tradeoff_pixels() -> Experiment:
    """A decoder that reads pixels and predicts them from noisy ones, and needs no other model."""
    return arm(
        transfusion.Config(image=LATE_MASKED, language=text(WORDS + 2), **DRAWN),
        draws=True,
        sampling=transfusion.Sampling(solver="heun", steps=25, guidance=3.0),
    )


def tradeoff_encoder_free() -> Experiment:
    """The same model, which only reads: a reader without an encoder of images."""
    return arm(transfusion.Config(image=LATE_MASKED, language=text(WORDS + 2), **MARKS), draws=False)


def tradeoff_coded_pixels() -> Experiment:
    """A decoder that names 16 codes of its own making before it draws pixels, and needs no other model either."""
    codes = OwnCodes(code_at=WORDS + 2, size=256)
    image = CodedPixels(**vars(LATE_MASKED), codes=codes)
    return arm(
        transfusion.Config(image=image, language=text(codes.untold + 1, context_length=120), **DRAWN),
        draws=True,
        sampling=transfusion.Sampling(solver="heun", steps=25, guidance=3.0),
    )


PRESETS = (
    tradeoff_reader,
    tradeoff_encoder_free,
    tradeoff_chameleon,
    tradeoff_transfusion,
    tradeoff_pixels,
    tradeoff_coded_pixels,
)
