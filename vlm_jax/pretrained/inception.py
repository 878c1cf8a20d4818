"""The network of FID in safetensors, by the key names of pytorch-fid, which are torchvision's.

Its release is a pickle, `pt_inception-2015-12-05-6726825d.pth`, of which the message that refuses it tells how to make
safetensors. The names of torchvision's own Inception are the same and its weights are those of another network.
"""

from collections.abc import Iterator
from typing import Any

from vlm_jax.data import Image, Tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import inception
from vlm_jax.pretrained.layout import Entry, Layout, Source, abstract_params, linear
from vlm_jax.pretrained.pyramids import kernel_entry
from vlm_jax.pretrained.settings import require
from vlm_jax.trees import leaves_by_path

FIRST, LAST = "Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"
NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
"""Ours -> theirs."""
OTHERS = 1000
"""Classes that torchvision's own weights tell."""


def config(source: Source) -> inception.Config:
    """Of the arrays, for nothing else tells.

    Raises:
      UserError: they are of no such network, or are torchvision's own.
    """
    tensors = source.tensors
    classes = tensors.shape("fc.weight")[0] if "fc.weight" in tensors else None
    if classes == OTHERS:
        raise UserError(
            f"fc.weight in {tensors.path} tells {OTHERS} classes, as the weights of torchvision do, whose network "
            f"pools otherwise: give those of FID, which tell {inception.Config.classes}"
        )
    return inception.Config(width=tensors.shape(FIRST)[0], classes=classes)


def entries(config: inception.Config) -> Iterator[Entry]:
    """Paths are theirs, but for what an array is called."""
    for path in leaves_by_path(abstract_params(config)):
        parent, _, name = path.rpartition("/")
        key = parent.replace("/", ".")
        if parent.endswith("conv"):
            yield kernel_entry(parent, key)
        elif parent.endswith("bn"):
            yield Entry(path, f"{key}.{NORM[name]}")
    if config.classes is not None:
        yield from linear("fc", "fc")


def export(experiment: Experiment, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    """No settings: there are none."""
    require({"size": (experiment.model.size, inception.Config.size)}, "Inception")
    return {}


LAYOUT = Layout(
    name="inception-fid",
    family="inception",
    recognises=lambda source: {FIRST, LAST} <= set(source.tensors),
    config=config,
    entries=entries,
    fields=lambda source: (Image(resize="squash", method="bilinear"),),
    idle=(r".*\.num_batches_tracked", r"AuxLogits\..*"),
    export=export,
)
