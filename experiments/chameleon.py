"""Chameleon: one decoder that reads and writes text and images' codes (2405.09818)."""

from dataclasses import replace

from experiments.data import OPENMOJI, TINY, TINY_OPTIMIZER
from experiments.vqvae import vqvae_tiny
from vlm_jax.data import Data, Interleaved, Text, VisualCaption
from vlm_jax.data.conversation import ALONE
from vlm_jax.experiment import Experiment
from vlm_jax.models import chameleon, language, vqvae
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.start import Start
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

FIELDS = (Interleaved(), VisualCaption(template=ALONE))
"""Captions and images in either order; and how a caption is asked for."""


def chameleon_tiny() -> Experiment:
    """Emoji and their names, 64x64, as the codes of `vqvae-tiny`, which is needed; draws and reads."""
    decoder = DecoderConfig(
        width=192, depth=6, heads=6, kv_heads=6, head_width=32, mlp=512, qk_norm="layer", dropout=0.1
    )
    words = 1024
    return Experiment(
        model=chameleon.Config(
            first=vqvae_tiny().model,
            language=language.Config(vocab_size=words + 2 + 512, context_length=96, eos_id=2, decoder=decoder),
            bos_id=1,
            begin_id=words,
            end_id=words + 1,
            code_at=words + 2,
        ),
        sampling=chameleon.Sampling(guidance=3.0),
        data=replace(OPENMOJI, fields=FIELDS, text=Text(vocab_size=words)),
        training=replace(
            TINY,
            optimizer=replace(TINY_OPTIMIZER, warmup_steps=100, weight_decay=0.1, b2=0.95),
            steps=1500,
            batch_size=64,
        ),
        start=(Start(workdir="runs/vqvae-tiny", into="first"),),
        frozen=(r"^first/",),
    )


def published(text: language.Config, *, steps: int, images: int = 2) -> Experiment:
    """A published size and schedule (2405.09818, section 2.3 and table 1) on captioned images that TFDS has prepared.

    AdamW of (0.9, 0.95), eps 1e-5, decay 0.1, gradients clipped at 1, 1e-4 after 4,000 steps of warm-up; the paper's
    rate falls exponentially, here by a cosine. Tokens are numbered as the release's tokenizer numbers them, whose text
    tokens stand beside the codes of images: one that is trained here would give its own the codes' numbers.
    """
    return Experiment(
        model=chameleon.Config(
            first=vqvae.CHAMELEON_F16,
            language=text,
            bos_id=0,
            begin_id=8197,
            end_id=8196,
            code_at=4,
            images=images,
        ),
        sampling=chameleon.Sampling(top_p=0.9, guidance=3.0, image_guidance=1.2),
        data=Data(name="coco_captions", test="val", fields=FIELDS, pack=True, text=Text(vocab_size=text.vocab_size)),
        training=Training(
            optimizer=Optimizer(
                learning_rate=1e-4, warmup_steps=4000, weight_decay=0.1, b2=0.95, eps=1e-5, clip_norm=1.0
            ),
            steps=steps,
            batch_size=2048,
            checkpoint_every=2000,
        ),
        start=(Start(workdir="runs/chameleon-tokenizer", into="first"),),
        frozen=(r"^first/",),
        frozen_dtype="bfloat16",
    )


def chameleon_7b() -> Experiment:
    """Chameleon-7B (2405.09818, table 1): 7.01B parameters beside the tokenizer, 4.4 trillion tokens, 4,096 a row.

    Needs a tokenizer of 8,192 codes in runs/chameleon-tokenizer, the release's of texts (--data.text.tokenizer), a
    captioned data set (--data.name) and --mesh.fsdp.
    """
    return published(chameleon.CHAMELEON_7B, steps=524_520)


def chameleon_34b() -> Experiment:
    """Chameleon-34B (2405.09818, table 1): 34.3B parameters, 4.2 trillion tokens; else as 7B."""
    return published(chameleon.CHAMELEON_34B, steps=500_680)


PRESETS = (chameleon_tiny, chameleon_7b, chameleon_34b)
