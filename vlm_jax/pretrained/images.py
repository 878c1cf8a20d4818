"""What becomes of pixels before a published tower sees them, as its `preprocessor_config.json` says: in, and out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vlm_jax.data.fields import Image
from vlm_jax.data.transforms import Method
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models.clip import OPENAI_MEAN, OPENAI_STD
from vlm_jax.nn.vision import VisionTransformer

METHODS: dict[int, Method] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters."""


class Pixels(NamedTuple):
    """How a picture becomes what a tower reads."""

    image: Image
    mean: tuple[float, ...]
    std: tuple[float, ...]


def square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def cropping(size: int) -> dict[str, Any]:
    """What CLIP's processor does when it is told nothing."""
    crop = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square(size)}
    return {**crop, "resample": 3, "image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}


def squashing(size: int) -> dict[str, Any]:
    """What SigLIP's processor does when it is told nothing."""
    return {"size": square(size), "resample": 3, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


def pixels(told: Mapping[str, Any], usual: Mapping[str, Any], size: int, where: str) -> Pixels:
    """What a `preprocessor_config.json` tells.

    Args:
      told: all of it; empty: there is none.
      usual: what its processor does where that says nothing.
      size: of the images that the tower reads.
      where: the file, for messages.

    Raises:
      UserError: it does something that `Image` cannot express, which is named.
    """
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "do_pad": False}
    does: dict[str, Any] = {**steps, "rescale_factor": 1 / 255, **usual, **told}
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not does[name]:
            raise UserError(f"{name} in {where} is {does[name]}: images are always resized and normalised here")
    if abs(does["rescale_factor"] * 255 - 1) > 1e-4:
        raise UserError(f"rescale_factor in {where} is {does['rescale_factor']}: 1/255 can be expressed alone")
    if does["resample"] not in METHODS:
        known = ", ".join(f"{number} ({method})" for number, method in METHODS.items())
        raise UserError(f"resample in {where} is {does['resample']}: {known} can be expressed")
    whole, cut = does["size"], does.get("crop_size")
    if isinstance(whole, int):
        whole = {"shortest_edge": whole} if does["do_center_crop"] else square(whole)
    cut = square(cut) if isinstance(cut, int) else cut
    cut = cut if does["do_center_crop"] else None
    mean, std = tuple(map(float, does["image_mean"])), tuple(map(float, does["image_std"]))
    made: dict[str, Any] = {"method": METHODS[does["resample"]]}
    if whole == {"shortest_edge": size} and cut == square(size):
        if does["do_pad"]:
            made |= {"resize": "pad", "pad_colour": tuple(int(255 * each) for each in mean)}
        else:
            made["resize"] = "crop"
    elif whole == square(size) and cut in (None, square(size)) and not does["do_pad"]:
        made["resize"] = "squash"
    else:
        raise UserError(
            f"size in {where} is {whole}, crop_size {cut} and do_pad {does['do_pad']}: of a tower that reads {size} "
            f"pixels a side a crop of the shorter side, a square without proportions, and a padded one can be expressed"
        )
    return Pixels(Image(**made), mean, std)


def processor(experiment: Experiment, tower: VisionTransformer, kind: str) -> dict[str, Any]:
    """The inverse: a `preprocessor_config.json`.

    Args:
      kind: such as CLIPImageProcessor.

    Raises:
      UserError: such a processor does not do what the run's data do.
    """
    image = next((field for field in experiment.data.fields if isinstance(field, Image)), Image())
    each = 1 if len(tower.mean) > 1 else tower.channels
    return {
        **resizing(image, tower.image_size, kind),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*tower.mean] * each,
        "image_std": [*tower.std] * (tower.channels if len(tower.std) == 1 else 1),
        "do_convert_rgb": tower.channels == 3,
    }


def resizing(image: Image, size: int, kind: str) -> dict[str, Any]:
    """Of that, how a picture of any shape becomes a square of `size`; raises as `processor`."""
    if image.resize == "pad":
        raise UserError(f"data.fields pad images, which {kind} does not: the model stays a run")
    crops = image.resize == "crop"
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": size} if crops else square(size),
        "resample": next(number for number, method in METHODS.items() if method == image.method),
        "do_center_crop": crops,
        **({"crop_size": square(size)} if crops else {}),
    }
