"""Coupling flows, and masked-convolution flows."""

from dataclasses import replace

from experiments.data import (
    CIFAR10,
    DIGITS,
    DIGITS_IMAGE,
    FASHION_IMAGE,
    FASHION_MNIST,
    SMALL,
    TINY,
    TINY_OPTIMIZER,
)
from vlm_jax.data import Data
from vlm_jax.experiment import Experiment
from vlm_jax.models import flow
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

DIGITS_FLOW = flow.Config(**DIGITS_IMAGE, scales=2, steps=4, width=64, logit_margin=0.05, dropout=0.3)
DIGITS_TRAINING = replace(TINY, optimizer=replace(TINY_OPTIMIZER, weight_decay=0.05), steps=600, checkpoint_every=100)


def flow_tiny() -> Experiment:
    """Handwritten digits, 8x8, 17 levels; three minutes on a CPU."""
    return Experiment(
        model=replace(DIGITS_FLOW, steps=6, mixtures=4, dequantisation="variational", dequantisation_steps=3),
        data=DIGITS,
        training=DIGITS_TRAINING,
    )


def flow_tiny_macow() -> Experiment:
    """MaCow on handwritten digits, 8x8, 17 levels; minutes on a CPU."""
    return Experiment(
        model=replace(DIGITS_FLOW, masked_width=32),
        data=DIGITS,
        training=DIGITS_TRAINING,
    )


def flow_fashion_mnist() -> Experiment:
    """Fashion-MNIST, 28x28, 256 levels; a day on a CPU core."""
    return Experiment(
        model=flow.Config(
            **FASHION_IMAGE,
            scales=2,
            steps=8,
            width=128,
            mixtures=8,
            dequantisation="variational",
            logit_margin=0.05,
            dropout=0.1,
        ),
        data=replace(FASHION_MNIST, train="train[:58000]", validation="train[58000:]"),
        training=SMALL,
    )


def flow_glow_cifar10() -> Experiment:
    """Glow on CIFAR-10 (1807.03039): 3.35 bits a dimension; 44.2M parameters, the fixed permutations among them.

    The release shifts images by up to a tenth of their size, and has Adamax where this has Adam with clipped gradients.
    Needs cifar10 prepared by TFDS.
    """
    return Experiment(
        model=flow.Config(image_size=32, scales=3, steps=32, width=512),
        data=CIFAR10,
        training=Training(
            optimizer=Optimizer(learning_rate=1e-3, schedule="constant", warmup_steps=1000),
            steps=175_000,
            batch_size=512,
            log_every=50,
            checkpoint_every=2000,
        ),
    )


def flow_glow_imagenet64() -> Experiment:
    """Glow on ImageNet 64x64 (1807.03039): 3.81 bits a dimension; 112.3M parameters. Adam as on CIFAR-10.

    Needs downsampled_imagenet/64x64 prepared by TFDS.
    """
    return Experiment(
        model=flow.Config(image_size=64, scales=4, steps=48, width=512),
        data=Data(name="downsampled_imagenet/64x64", test="validation"),
        training=Training(
            optimizer=Optimizer(learning_rate=1e-3, schedule="constant", warmup_steps=1000),
            steps=1_000_000,
            batch_size=128,
            log_every=50,
            checkpoint_every=2000,
        ),
    )


PRESETS = (flow_tiny, flow_tiny_macow, flow_fashion_mnist, flow_glow_cifar10, flow_glow_imagenet64)
