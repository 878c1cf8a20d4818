"""Transformer autoregressive flows."""

from dataclasses import replace
from typing import Any

from experiments.data import DIGITS, DIGITS_IMAGE, FLIPPED, TINY, TINY_OPTIMIZER
from vlm_jax.data import Data
from vlm_jax.experiment import Experiment
from vlm_jax.models import tarflow
from vlm_jax.nn.transformer import Transformer
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def tarflow_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels, in patches of 2x2 pixels; minutes on a CPU."""
    return Experiment(
        model=tarflow.Config(
            **DIGITS_IMAGE,
            patch_size=2,
            blocks=4,
            transformer=Transformer(width=64, depth=2, heads=4, mlp=256, dropout=0.1),
        ),
        data=DIGITS,
        training=replace(TINY, optimizer=replace(TINY_OPTIMIZER, weight_decay=0.05), steps=1500, checkpoint_every=100),
    )


def imagenet64(name: str, test: str, steps: int, **settings: Any) -> Experiment:
    """[2-768-8-8] of 2412.06329, with the settings of the authors' release."""
    return Experiment(
        model=tarflow.Config(
            image_size=64,
            patch_size=2,
            blocks=8,
            transformer=Transformer(width=768, depth=8, heads=12, mlp=3072, remat="all"),
            **settings,
        ),
        data=Data(name=name, test=test, fields=FLIPPED),
        training=Training(
            optimizer=Optimizer(learning_rate=1e-4, b2=0.95, warmup_steps=5004, weight_decay=1e-4, clip_norm=None),
            steps=steps,
            batch_size=256,
            log_every=50,
            checkpoint_every=2000,
        ),
    )


def tarflow_imagenet64() -> Experiment:
    """TarFlow [2-768-8-8] on ImageNet 64x64 (2412.06329): 2.99 bits a dimension; 460M parameters.

    The release's settings: 100 epochs in float32, the first of them of warm-up, and no average of the parameters. Its
    rate falls to 1e-6, this one to zero. Needs downsampled_imagenet/64x64 prepared by TFDS.
    """
    return imagenet64("downsampled_imagenet/64x64", "validation", 500_400)


def tarflow_imagenet64_class() -> Experiment:
    """TarFlow [2-768-8-8] on ImageNet 64x64 told the class (2412.06329), for samples: the release's guidance is 2.3.

    200 epochs in bfloat16 on images with Gaussian noise of 0.05, a tenth of them without their class; the rest as
    tarflow-imagenet64. Needs imagenet2012 prepared by TFDS.
    """
    experiment = imagenet64("imagenet2012", "validation", 1_000_800, classes=1000, class_dropout=0.1, noise=0.05)
    transformer = replace(experiment.model.transformer, dtype="bfloat16")
    return replace(
        experiment,
        model=replace(experiment.model, transformer=transformer),
        sampling=tarflow.Sampling(guidance=2.3),
    )


PRESETS = (tarflow_tiny, tarflow_imagenet64, tarflow_imagenet64_class)
