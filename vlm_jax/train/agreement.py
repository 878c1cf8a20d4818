"""What the processes of a run tell each other, so that all of them decide alike."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(problem: str) -> str:
    """The first problem that a process sees, on all of them; empty if none sees any."""
    return next(filter(None, gather(problem)), "")


def gather(text: str) -> list[str]:
    """The text of each process."""
    if jax.process_count() == 1:
        return [text]
    characters = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(characters.size))
    padded = np.zeros(max(lengths) + 1, np.uint8)
    padded[: characters.size] = characters
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
