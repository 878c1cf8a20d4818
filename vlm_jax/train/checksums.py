"""Checksums of a checkpoint's files: written when it is complete, compared before a value of it is used.

The manifest is one file at the top of a checkpoint. Its first line is the checksum of the rest, which is JSON, so
that a manifest is either exactly what was written or known to be damaged.
"""

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "CHECKSUMS"


class DamagedError(Exception):
    """A checkpoint is not what was written; the message names the file, relative to the checkpoint, and the damage."""


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint holds."""

    validation_loss: float | None
    files: dict[str, tuple[int, str]]
    """The size in bytes and the checksum of each file, by its path relative to the checkpoint."""


def write_manifest(checkpoint: Path, validation_loss: float | None) -> None:
    """Writes the manifest of the files of every item of a checkpoint, that is of its subdirectories.

    Files at the top of the checkpoint are orbax's notes, such as the time of the last rename. It writes them after
    this, and nothing restored comes from them.
    """
    paths = [path for path in checkpoint.glob("*/**/*") if path.is_file()]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_file_digest, paths)
        files = {
            path.relative_to(checkpoint).as_posix(): (path.stat().st_size, digest)
            for path, digest in zip(paths, digests, strict=True)
        }
    body = json.dumps(asdict(Manifest(validation_loss, files)), indent=1, sort_keys=True).encode()
    (checkpoint / MANIFEST).write_bytes(_digest(body) + b"\n" + body)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
      DamagedError: it is missing or not what was written.
    """
    try:
        digest, _, body = (checkpoint / MANIFEST).read_bytes().partition(b"\n")
    except OSError as error:
        raise DamagedError(f"{MANIFEST}: {error.strerror}") from error
    if digest != _digest(body):
        raise DamagedError(f"{MANIFEST}: checksum differs")
    content = json.loads(body)
    files = {path: (size, digest) for path, (size, digest) in content["files"].items()}
    return Manifest(content["validation_loss"], files)


def verify(checkpoint: Path, items: Collection[str], *, share: int = 0, shares: int = 1) -> None:
    """Reads every `shares`-th file of the given items, from the `share`-th on, and compares it with the manifest.

    Raises:
      DamagedError: the manifest or a file is missing, cannot be read, or differs.
    """
    manifest = read_manifest(checkpoint)
    paths = sorted(path for path in manifest.files if path.partition("/")[0] in items)
    with ThreadPoolExecutor() as pool:
        verdicts = pool.map(lambda path: _damage(checkpoint / path, *manifest.files[path]), paths[share::shares])
        for path, damage in zip(paths[share::shares], verdicts, strict=True):
            if damage is not None:
                raise DamagedError(f"{path}: {damage}")


def _damage(path: Path, size: int, digest: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{found} bytes instead of {size}"
        return None if _file_digest(path) == digest else "checksum differs"
    except OSError as error:
        return error.strerror


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body).hexdigest().encode()
