"""Documents in rows of one length, after a plan that is made once: any row can be read at any time."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from vlm_jax.data.fields import Example, Inputs, Record, Rng, TextReader, Tokens, row
from vlm_jax.data.source import Source, Staged
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.errors import UserError

WINDOW = 4096
"""Documents that are packed among themselves: so many that little room is left, so few that a row is a fair draw."""


def plan(
    lengths: Int[np.ndarray, " N"],
    size: int,
    seed: int,
    window: int = WINDOW,
    *,
    images: Int[np.ndarray, " N"] | None = None,
    most: int = 0,
) -> list[list[int]]:
    """The documents of each row: every one once, whole, in rows of at most `size` tokens and `most` images.

    Best fit, the longest first, within windows of the documents in random order: of the rows in which a document fits,
    it lies in the fullest (Johnson et al. 1974: at most 11/9 of the rows that a window needs, and a part of one).

    Args:
      lengths: from 1 to `size`.
      seed: of the order.
      images: of each document, at most `most`; None: there are none.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        # Rows by the images and the tokens that still fit; bit r of `rooms`: a row has room for r tokens.
        with_room: list[list[list[list[int]]]] = [[[] for _ in range(size + 1)] for _ in range(most + 1)]
        rooms = [0] * (most + 1)
        for document in part[np.argsort(-lengths[part], kind="stable")].tolist():
            length, taken = int(lengths[document]), 0 if images is None else int(images[document])
            fitting = [(bits, left) for left in range(taken, most + 1) if (bits := rooms[left] >> length)]
            if fitting:
                room, left = min((length + (bits & -bits).bit_length() - 1, left) for bits, left in fitting)
                chosen = with_room[left][room].pop()
                if not with_room[left][room]:
                    rooms[left] ^= 1 << room
            else:
                room, left, chosen = size, most, []
                rows.append(chosen)
            chosen.append(document)
            if room > length:
                with_room[left - taken][room - length].append(chosen)
                rooms[left - taken] |= 1 << (room - length)
    return rows


@dataclass(frozen=True, eq=False)
class Packed:
    """The documents of one split in rows. `packed[i]` has `tokens`, `target`, `segment` and, of a model that sees,
    `image_at`; `example` reads the images.

    All tokens are kept in memory, five bytes each: to plan, they have to be counted, and to read a record again for
    each of its words would take longer than to train on them. Images are read when the row is.
    """

    source: Source | Staged
    reader: TextReader
    inputs: Inputs
    records: Int[np.ndarray, " N"]
    """Of which record of the source each document is."""
    rows: list[list[int]] = field(repr=False)
    """The documents of each row, in order."""
    _documents: Tokens = field(repr=False)
    """All of them, end to end."""
    _bounds: Int[np.ndarray, " N+1"] = field(repr=False)
    """Where each begins, and where the last ends."""
    _image_bounds: Int[np.ndarray, " N+1"] = field(repr=False)
    """Of the places of images, the same."""
    _pad_id: int = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        documents = [self.document(number) for number in self.rows[index]]
        return row(documents, self.inputs, self._pad_id) | {INDEX: np.asarray(index)}

    def document(self, number: int) -> Tokens:
        """The tokens of one, and the places of its images."""
        part, images = (slice(*bounds[number : number + 2]) for bounds in (self._bounds, self._image_bounds))
        return Tokens(self._documents.tokens[part], self._documents.target[part], self._documents.image_at[images])

    def example(self, row: Record, rng: Rng) -> Example:
        """A row with its images.

        Raises:
          UserError: one cannot be used.
        """
        found = {name: value for name, value in row.items() if name != INDEX}
        numbers = self.rows[int(row[INDEX])]
        records = np.repeat(self.records[numbers], np.diff(self._image_bounds)[numbers]).tolist()
        return found | self.reader.images([self.source[record] for record in records], self.inputs, rng)

    @property
    def waste(self) -> float:
        """The share of all rows that is padding."""
        return 1 - int(self._bounds[-1]) / (len(self) * self.inputs["tokens"].shape[0])

    def __str__(self) -> str:
        documents = f"{len(self.records):,} documents of {self.source.name}, {self.source.split}"
        length = self.inputs["tokens"].shape[0]
        return f"{documents}: {len(self):,} rows of {length} tokens, {self.waste:.1%} of them padding"


INDEX = "row"
"""Under which a row says which it is, until its images are read."""


def packed(source: Source | Staged, reader: TextReader, tokenizer: Tokenizer, inputs: Inputs, seed: int = 0) -> Packed:
    """Reads all documents of a split and plans their rows.

    A document that is longer than a row becomes several, of which each but the last fills one, if its reader cuts it;
    what would then have nothing to predict is left out.

    Raises:
      UserError: a record is damaged, or the split has no documents.
    """
    length, found, records = inputs["tokens"].shape[0], list[Tokens](), list[int]()
    for index in tqdm(range(len(source)), desc=f"reading {source.name}", unit=" records", leave=False, disable=None):
        record = source[index]
        for document in reader.documents(record, inputs, tokenizer):
            whole = [part for part in reader.parts(document, length, record) if part.target.any()]
            found += whole
            records += [index] * len(whole)
    if not found:
        raise UserError(f"{source.name}, split {source.split}, has no texts to pack: choose another data set")
    lengths, images = (
        np.array([len(value) for value in each])
        for each in zip(*((part.tokens, part.image_at) for part in found), strict=True)
    )
    most = inputs["image_at"].shape[0] if "image_at" in inputs else 0
    return Packed(
        source=source,
        reader=reader,
        inputs=inputs,
        records=np.array(records),
        rows=plan(lengths, length, seed, images=images, most=most),
        _documents=Tokens(*(np.concatenate(parts) for parts in zip(*found, strict=True))),
        _bounds=np.concatenate([[0], np.cumsum(lengths)]),
        _image_bounds=np.concatenate([[0], np.cumsum(images)]),
        _pad_id=tokenizer.pad_id,
    )
