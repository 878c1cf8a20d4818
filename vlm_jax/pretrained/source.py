"""Published weights where they lie: a file, a directory, or one of directories, as a pipeline of diffusers is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax.data import Tokenizer, load_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.files import parse_json
from vlm_jax.identity import listed
from vlm_jax.pretrained.tensors import Tensors, joined, open_tensors

CONFIG = "config.json"
PIPELINE = "model_index.json"
"""In a directory of directories, and says what each of them is."""
PARTS = ("unet", "transformer", "vae", "text_encoder")
"""Those of a pipeline that hold weights of models that there are here."""
FIRST_STAGE = "vqgan"
"""A directory within that of a model of images' codes: its first stage, where that was published apart."""


@dataclass(frozen=True)
class Source:
    """Published weights and what lies beside them."""

    path: Path
    """The file of weights, or its directory."""
    tensors: Tensors
    config: Mapping[str, Any]
    """`config.json`; of a pipeline its index, of a GGUF its metadata; empty where there is none."""

    @property
    def directory(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def beside(self, name: str) -> Mapping[str, Any]:
        """A JSON object in the directory, such as `preprocessor_config.json`; empty if it is not there.

        Raises:
          UserError: it is damaged.
        """
        return read_json(self.directory / name)

    def part(self, name: str) -> "Source":
        """A directory within it as a source of its own, whose keys are those that its files have.

        Raises:
          UserError: it is not there.
        """
        directory = self.directory / name
        if not directory.is_dir():
            raise UserError(f"{self.directory} lacks {name}, a directory: fetch all of the pipeline")
        return Source(directory, self.tensors.under(f"{name}/"), read_json(directory / CONFIG))

    @property
    def described(self) -> str:
        """What it is, for messages."""
        if (self.directory / PIPELINE).is_file():
            return f"it is a pipeline of class {self.config.get('_class_name')!r}"
        return f"it holds {listed(sorted(self.tensors), most=3)}"


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
      UserError: it cannot be read, or is none.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object: fetch it again")
    return content


def open_source(path: Path) -> Source:
    """Published weights: a file, a directory, or a pipeline, of whose directories `PARTS` are opened.

    The keys of what lies in a directory within begin with its name; so do those of a `FIRST_STAGE`.

    Raises:
      UserError: they cannot be read, and why.
    """
    if (path / PIPELINE).is_file():
        there = [name for name in PARTS if (path / name).is_dir()]
        parts = {f"{name}/": open_tensors(path / name) for name in there}
        return Source(path, joined(path, parts), read_json(path / PIPELINE))
    tensors = open_tensors(path)
    directory = path if path.is_dir() else path.parent
    facts = tensors.facts if tensors.path.suffix == ".gguf" else read_json(directory / CONFIG)
    if (directory / FIRST_STAGE).is_dir():
        tensors = joined(directory, {"": tensors, f"{FIRST_STAGE}/": open_tensors(directory / FIRST_STAGE)})
    return Source(path, tensors, facts)


def tokenizer_beside(source: Source) -> Tokenizer | None:
    """The `tokenizer.json` in the directory; None: there is none."""
    path = source.directory / "tokenizer.json"
    return load_tokenizer(path) if path.is_file() else None
