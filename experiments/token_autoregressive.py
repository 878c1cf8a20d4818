"""Autoregressive models of codes: LlamaGen."""

from dataclasses import replace

from experiments.data import DIGITS, TINY, TINY_OPTIMIZER
from experiments.latent_diffusion import CAPTIONED, READER, read_by
from experiments.vqvae import llamagen_tokenizer_f16, vqvae_tiny, vqvae_tiny_digits
from vlm_jax.data import Data, Image, Label
from vlm_jax.experiment import Experiment
from vlm_jax.models import token_autoregressive
from vlm_jax.nn.decoder import DecoderConfig
from vlm_jax.start import Start
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def token_autoregressive_tiny() -> Experiment:
    """Emoji of their names, 64x64: the codes of `vqvae-tiny`, told by `clip-small`; needs both runs.

    45 minutes on two CPU cores, with tests beside; step 600 is the best by validation. `python -m tools.evaluate
    runs/token-autoregressive-tiny --judge runs/clip-judge-a runs/clip-judge-b`: of 400 held-out captions 19.5% and
    18.5% are among the ten nearest to their drawing, where they are among those of the real one for 35.5% and 37.0%.
    """
    decoder = DecoderConfig(width=192, depth=6, heads=6, kv_heads=6, head_width=32, mlp=512, dropout=0.1)
    return Experiment(
        model=token_autoregressive.Config(first=vqvae_tiny().model, decoder=decoder, text=READER),
        sampling=token_autoregressive.Sampling(guidance=3.0),
        data=CAPTIONED,
        training=replace(TINY, optimizer=replace(TINY_OPTIMIZER, warmup_steps=100), steps=1500, batch_size=64),
        start=(Start(workdir="runs/vqvae-tiny", into="first"), read_by("runs/clip-small", "text")),
        frozen=(r"^first/", r"^text/"),
        cached=True,
    )


def token_autoregressive_tiny_digits() -> Experiment:
    """The codes of `vqvae-tiny-digits`, which is needed: a bound by two exact sums."""
    decoder = DecoderConfig(width=128, depth=4, heads=4, kv_heads=4, head_width=32, mlp=344, dropout=0.1)
    return Experiment(
        model=token_autoregressive.Config(first=vqvae_tiny_digits().model, decoder=decoder),
        data=DIGITS,
        training=TINY,
        start=(Start(workdir="runs/vqvae-tiny-digits", into="first"),),
        frozen=(r"^first/",),
        cached=True,
    )


def llamagen(decoder: DecoderConfig, learning_rate: float) -> Experiment:
    """A published size and schedule (2406.06525, section 3.2), told the class, on ImageNet at 256 pixels.

    AdamW of (0.9, 0.95), decay 0.05, gradients clipped at 1, 300 epochs of 256 images; guidance 2 of all codes.
    """
    return Experiment(
        model=token_autoregressive.Config(
            first=replace(llamagen_tokenizer_f16().model, objective=None),
            decoder=replace(decoder, dtype="bfloat16"),
            classes=1000,
        ),
        sampling=token_autoregressive.Sampling(guidance=2.0),
        data=Data(name="imagenet2012", test="validation", fields=(Image(crop_min_area=0.64, flip=True), Label())),
        training=Training(
            optimizer=Optimizer(learning_rate=learning_rate, schedule="constant", weight_decay=0.05, b2=0.95),
            steps=1_501_200,
            batch_size=256,
            checkpoint_every=10_000,
        ),
        start=(Start(workdir="runs/llamagen-tokenizer-f16", into="first", leave=(r"^first/objective/",)),),
        frozen=(r"^first/",),
        frozen_dtype="bfloat16",
    )


def llamagen_b() -> Experiment:
    """LlamaGen-B (2406.06525, table 2): 111M parameters, FID-50K 5.46 at 256 pixels, guidance 2.

    Needs imagenet2012 prepared by TFDS, and the tokenizer's run in runs/llamagen-tokenizer-f16, trained or converted.
    """
    return llamagen(token_autoregressive.LLAMAGEN_B, 1e-4)


def llamagen_l() -> Experiment:
    """LlamaGen-L (2406.06525, table 2): 343M parameters, FID-50K 3.80; in all else as B."""
    return llamagen(token_autoregressive.LLAMAGEN_L, 1e-4)


def llamagen_xl() -> Experiment:
    """LlamaGen-XL (2406.06525, table 2): 775M parameters, FID-50K 3.39, at 384 pixels 2.62; in all else as B."""
    return llamagen(token_autoregressive.LLAMAGEN_XL, 2e-4)


PRESETS = (token_autoregressive_tiny, token_autoregressive_tiny_digits, llamagen_b, llamagen_l, llamagen_xl)
