"""What the denoisers of diffusers have in common: tables of their parts, and the types of their blocks."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.pretrained.layout import Entry, linear
from vlm_jax.records import to_json


def below(ours: str, theirs: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The table of a part of a model, whose paths and keys begin so."""
    return (replace(entry, path=ours + entry.path, key=theirs + entry.key) for entry in entries)


def halves_swapped(kernel: np.ndarray) -> np.ndarray:
    """[in, out], of its rows the second half before the first."""
    return np.concatenate(np.split(kernel, 2)[::-1])


def time_entries(path: str, key_in: str, key_out: str) -> Iterator[Entry]:
    """What is made of a time. Its features are sines before cosines here, and there cosines before sines."""
    for entry in linear(f"{path}/time_in", key_in):
        if entry.path.endswith("kernel"):
            read, write = (lambda kernel: halves_swapped(kernel.T)), (lambda kernel: halves_swapped(kernel).T)
            entry = replace(entry, read=read, write=write)
        yield entry
    yield from linear(f"{path}/time_out", key_out)


def attention_entries(path: str, key: str, *, bias: bool) -> Iterator[Entry]:
    """Multi-head attention; `bias`: of queries, keys and values."""
    for ours, theirs in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
        yield from linear(f"{path}/{ours}", f"{key}.{theirs}", bias=bias)
    yield from linear(f"{path}/out", f"{key}.to_out.0")


def side_of(size: Any, where: str) -> int:
    """The height of the latents, which is their width, too; raises a `UserError` where they have no one such."""
    if not isinstance(size, int):
        raise UserError(f"sample_size in {where} is {size!r}: it must be a number, of the height and width of latents")
    return size


def settled(build: Callable[[], Any], where: str) -> Any:
    """A configuration, whose values are of their types.

    Raises:
      UserError: they are not, and what is wrong.
    """
    try:
        found = build()
        to_json(found)  # refuses what is not of the declared types
    except (TypeError, ValueError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{where} does not hold the settings of a denoiser ({error})") from error
    return found
