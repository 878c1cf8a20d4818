"""What presets share: the data sets, and how the tiny ones are trained."""

from dataclasses import replace
from typing import Any

from vlm_jax.data import Caption, Data, Image, Label
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

DIGITS = Data(name="digits", validation="validation")
DIGITS_IMAGE: dict[str, Any] = {"image_size": 8, "channels": 1, "levels": 17}
"""What a model is told of their images."""
OPENMOJI = Data(name="openmoji", train="train[:95%]", validation="train[95%:]")
FASHION_MNIST = Data(name="fashion_mnist", train="train[:95%]", validation="train[95%:]")
FASHION_IMAGE: dict[str, Any] = {"image_size": 28, "channels": 1}
CIFAR10 = Data(name="cifar10")
FLIPPED = (Image(flip=True), Caption(), Label())

TINY_OPTIMIZER = Optimizer(learning_rate=2e-3, warmup_steps=50, weight_decay=0.01, eps=1e-6)
TINY = Training(optimizer=TINY_OPTIMIZER, ema_decay=0.995, steps=1000, batch_size=128, checkpoint_every=200)

SMALL_OPTIMIZER = replace(TINY_OPTIMIZER, learning_rate=1e-3, warmup_steps=500)
SMALL = replace(TINY, optimizer=SMALL_OPTIMIZER, ema_decay=0.999, steps=20_000, log_every=50, checkpoint_every=1000)
"""Of what takes a day on a CPU, or an hour on a GPU."""
