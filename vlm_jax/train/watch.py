"""What is looked at as a model trains, at each checkpoint."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from vlm_jax.contract import Variables

logger = logging.getLogger(__name__)


class Moment(NamedTuple):
    """What a watcher is shown."""

    variables: Variables
    """To evaluate with: averaged parameters where an average is kept."""
    key: jax.Array
    """For noise, the same at each checkpoint."""
    stop: Callable[[], bool]
    """Whether a signal has come, so that saving is more urgent; all processes ask equally often."""


Watcher = Callable[[Moment], Mapping[str, float | np.ndarray]]
"""Numbers, and pictures, uint8 [H, W, 3], by name; empty where a signal came meanwhile. All processes call it."""


class Interrupted(Exception):  # noqa: N818
    """A signal came while a watcher was at work."""


def look(watchers: Iterable[Watcher], moment: Moment) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The numbers and the pictures of all watchers, as far as a signal leaves time for them."""
    seen: dict[str, float | np.ndarray] = {}
    for watcher in watchers:
        if moment.stop():
            break
        seen |= watcher(moment)
    pictures = {name: value for name, value in seen.items() if isinstance(value, np.ndarray)}
    return {name: float(value) for name, value in seen.items() if name not in pictures}, pictures


def harmless(name: str, watcher: Watcher) -> Watcher:
    """A watcher whose failure stops no run; it is told once, and tried again at the next checkpoint.

    For one process: others would wait for one that failed.
    """
    told = False

    def tried(moment: Moment) -> Mapping[str, float | np.ndarray]:
        nonlocal told
        try:
            return watcher(moment)
        except Interrupted:
            return {}
        except Exception as error:
            if not told:
                what = " ".join(str(error).split())
                logger.warning(f"{name} failed ({type(error).__name__}: {what}): the run goes on without it")
            told = True
            return {}

    return tried
