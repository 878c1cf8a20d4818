"""Autoregressive image transformers."""

from vlm_jax.data import Data
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoregressive
from vlm_jax.nn.transformer import Transformer
from vlm_jax.train.optim import Optimizer


def autoregressive_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels, pixel after pixel; minutes on a CPU."""
    return Experiment(
        model=autoregressive.Config(
            image_size=8,
            channels=1,
            levels=17,
            transformer=Transformer(width=96, depth=3, heads=4, mlp=384, dropout=0.1, scan=False),
        ),
        data=Data(name="digits", validation="validation", image_size=8, channels=1),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=50, weight_decay=0.05, eps=1e-6),
        ema_decay=0.995,
        steps=600,
        batch_size=64,
        checkpoint_every=100,
    )


def autoregressive_tiny_openmoji() -> Experiment:
    """Emoji, 32x32, 256 levels, in patches of 2x2 pixels; half an hour on two CPU cores."""
    return Experiment(
        model=autoregressive.Config(
            image_size=32,
            patch_size=2,
            transformer=Transformer(width=128, depth=4, heads=4, mlp=512, scan=False),
        ),
        data=Data(name="openmoji", train="train[:95%]", validation="train[95%:]", image_size=32),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=100, weight_decay=0.05, eps=1e-6),
        ema_decay=0.995,
        steps=1500,
        batch_size=16,
        checkpoint_every=250,
    )


PRESETS = (autoregressive_tiny, autoregressive_tiny_openmoji)
