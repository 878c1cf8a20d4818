"""Documents of text in rows of one length, after a plan that is made once: any row can be read at any time."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from vlm_jax.data.fields import Example, TextReader, Tokens, row
from vlm_jax.data.source import Source
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import UserError

WINDOW = 4096
"""Documents that are packed among themselves: so many that little room is left, so few that a row is a fair draw."""


def plan(lengths: Int[np.ndarray, " N"], size: int, seed: int, window: int = WINDOW) -> list[list[int]]:
    """The documents of each row: every one once, whole, in rows of at most `size` tokens.

    Best fit, the longest first, within windows of the documents in random order: of the rows in which a document fits,
    it lies in the fullest (Johnson et al. 1974: at most 11/9 of the rows that a window needs, and a part of one).

    Args:
      lengths: from 1 to `size`.
      seed: of the order.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        with_room: list[list[list[int]]] = [[] for _ in range(size + 1)]  # rows by the tokens that still fit
        rooms = 0  # bit r: a row has room for r tokens
        for document in part[np.argsort(-lengths[part], kind="stable")].tolist():
            length = int(lengths[document])
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                chosen = with_room[room].pop()
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                room, chosen = size, []
                rows.append(chosen)
            chosen.append(document)
            if room > length:
                with_room[room - length].append(chosen)
                rooms |= 1 << (room - length)
    return rows


@dataclass(frozen=True, eq=False)
class Packed:
    """The documents of one split in rows. `packed[i]` has `tokens`, `target` and `segment` [length].

    All tokens are kept in memory, five bytes each: to plan, they have to be counted, and to read a record again for
    each of its words would take longer than to train on them.
    """

    source: Source
    length: int
    _documents: Tokens = field(repr=False)
    """All of them, end to end."""
    _bounds: Int[np.ndarray, " N+1"] = field(repr=False)
    """Where each begins, and where the last ends."""
    _rows: list[list[int]] = field(repr=False)
    _pad_id: int = field(repr=False)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        parts = (slice(*self._bounds[number : number + 2]) for number in self._rows[index])
        return row([Tokens(*(each[part] for each in self._documents)) for part in parts], self.length, self._pad_id)

    @property
    def waste(self) -> float:
        """The share of all rows that is padding."""
        return 1 - int(self._bounds[-1]) / (len(self) * self.length)

    def __str__(self) -> str:
        documents = f"{len(self._bounds) - 1:,} documents of {self.source.name}, {self.source.split}"
        return f"{documents}: {len(self):,} rows of {self.length} tokens, {self.waste:.1%} of them padding"


def packed(source: Source, reader: TextReader, tokenizer: Tokenizer, length: int, seed: int = 0) -> Packed:
    """Reads all documents of a split and plans their rows.

    A document that is longer than a row becomes several, of which each but the last fills one; what would then have
    nothing to predict is left out.

    Raises:
      UserError: a record is damaged, or the split has no documents.
    """
    found = list(_pieces(source, reader, tokenizer, length))
    if not found:
        raise UserError(f"{source.name}, split {source.split}, has no texts to pack: choose another data set")
    lengths = np.array([len(piece.tokens) for piece in found])
    return Packed(
        source=source,
        length=length,
        _documents=Tokens(*(np.concatenate(parts) for parts in zip(*found, strict=True))),
        _bounds=np.concatenate([[0], np.cumsum(lengths)]),
        _rows=plan(lengths, length, seed),
        _pad_id=tokenizer.pad_id,
    )


def _pieces(source: Source, reader: TextReader, tokenizer: Tokenizer, length: int) -> Iterator[Tokens]:
    for index in tqdm(range(len(source)), desc=f"reading {source.name}", unit=" records", leave=False, disable=None):
        for each in reader.documents(source[index], tokenizer):
            for start in range(0, len(each.tokens), length):
                tokens, target = (part[start : start + length] for part in each)
                target = np.concatenate([[False], target[1:]])  # before the first of a row's tokens there are none
                if target.any():
                    yield Tokens(tokens, target)
