"""Mean and deviation of an autoencoder's latents, as diffusers' settings tell them and as a run keeps them.

A pipeline multiplies latents by `scaling_factor`, 1 over their deviation (2112.10752, appendix D.1), after it has taken
`shift_factor` from them. Some tell a mean and a deviation of each channel besides.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import UserError

LEAST = 1e-3
"""Of the deviation that `autoencoder` divides by."""


def moments(told: Mapping[str, Any], channels: int, where: str) -> dict[str, np.ndarray]:
    """The collection of that name, by its paths: mean and mean square of each channel.

    Args:
      told: settings, of which `scaling_factor` is there.
      where: the file, for messages.

    Raises:
      UserError: they are no numbers, or not of so many channels, or contradict each other.
    """

    def each(name: str, usual: float) -> np.ndarray:
        value = usual if told.get(name) is None else told[name]
        try:
            found = np.broadcast_to(np.asarray(value, np.float64), (channels,))
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} in {where} is {value!r}: latents have {channels} channels ({error})") from error
        if not np.isfinite(found).all():
            raise UserError(f"{name} in {where} is {value!r}: it must be finite")
        return found

    if told.get("shift_factor") is not None and told.get("latents_mean") is not None:
        raise UserError(f"latents_mean in {where} stands beside a shift_factor: one of them can be expressed")
    scale = each("scaling_factor", 1.0)
    mean = each("shift_factor", 0.0) + each("latents_mean", 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = each("latents_std", 1.0) / scale
    if not ((deviation >= LEAST) & (deviation < np.inf)).all():
        raise UserError(
            f"scaling_factor in {where} is {told['scaling_factor']!r}, of latents of a deviation of {deviation.min()}: "
            f"that must be a number, at least {LEAST}"
        )
    mean = mean.astype(np.float32).astype(np.float64)
    return {"moments/mean": mean.astype(np.float32), "moments/square": (mean**2 + deviation**2).astype(np.float32)}


def factors(collections: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: the settings, in as few digits as give the same moments."""
    mean, square = (np.asarray(collections["moments"][name]) for name in ("mean", "square"))
    variance = np.maximum(np.float64(square) - np.float64(mean) ** 2, LEAST**2)

    def kept(channel: int) -> Callable[[float], bool]:
        return lambda deviation: np.float32(np.float64(mean[channel]) ** 2 + deviation**2) == square[channel]

    shifts = [float(str(value)) for value in mean]
    if len(set(zip(mean.tolist(), square.tolist(), strict=True))) == 1:
        same = kept(0)
        scale = shortest(float(variance[0] ** -0.5), lambda scale: same(1 / scale))
        return {"scaling_factor": scale, "shift_factor": shifts[0] or None}
    deviations = [shortest(float(each**0.5), kept(channel)) for channel, each in enumerate(variance)]
    return {"scaling_factor": 1.0, "latents_mean": shifts, "latents_std": deviations}


def shortest(value: float, same: Callable[[float], bool]) -> float:
    """Of the roundings of a number the one of fewest digits that is as good."""
    return next((short for digits in range(1, 17) if same(short := float(f"{value:.{digits}g}"))), value)
