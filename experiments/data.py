"""What presets share: the data sets, and how the tiny ones are trained."""

from vlm_jax.data import Caption, Data, Image, Label
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

DIGITS = Data(name="digits", validation="validation")
OPENMOJI = Data(name="openmoji", train="train[:95%]", validation="train[95%:]")
FASHION_MNIST = Data(name="fashion_mnist", train="train[:95%]", validation="train[95%:]")
CIFAR10 = Data(name="cifar10")
FLIPPED = (Image(flip=True), Caption(), Label())

TINY_OPTIMIZER = Optimizer(learning_rate=2e-3, warmup_steps=50, weight_decay=0.01, eps=1e-6)
TINY = Training(optimizer=TINY_OPTIMIZER, ema_decay=0.995, steps=1000, batch_size=128, checkpoint_every=200)
