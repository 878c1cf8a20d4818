"""Files of published weights as named arrays, each read when it is asked for: safetensors, npz and GGUF.

Nothing that is read is executed: pickles are refused. What a file says of itself is compared with its length before an
array of it is made.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gguf
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_jax.errors import UserError
from vlm_jax.files import parse_json

BFLOAT16 = np.dtype(jnp.bfloat16)
INDEX = ".safetensors.index.json"
PLAIN = ("model", "diffusion_pytorch_model")
"""What files of weights are called; beside them may lie others, as `model.fp16.safetensors`."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
FLOATS = {"F16": np.dtype(np.float16), "BF16": BFLOAT16, "F32": np.dtype(np.float32), "F64": np.dtype(np.float64)}
"""Of safetensors' names; the only kinds of weights that there are here."""
INTEGERS = {name: np.dtype(kind) for name, kind in {"I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}.items()}
"""Of what some files hold beside weights, such as the places of a table."""


@dataclass(frozen=True)
class Stored:
    """An array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    """What it is read by; quantised values are float32 then."""


class Tensors(Mapping[str, np.ndarray]):
    """Named arrays of a file or several, of which one is in memory when it is asked for, and none before.

    Attributes:
      path: what they were read from, for messages.
      facts: what the file says of itself, such as the metadata of a GGUF.
    """

    def __init__(self, path: Path, stored: Mapping[str, Stored], facts: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.facts = facts or {}
        self._stored = dict(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        """The array.

        Raises:
          KeyError: there is none of that name.
          UserError: its bytes are damaged.
        """
        stored = self._stored[name]
        try:
            array = stored.read()
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{name} in {self.path} cannot be read ({error}): fetch the file again") from error
        assert (array.shape, array.dtype) == (stored.shape, stored.dtype), name
        return array

    def __contains__(self, name: object) -> bool:
        """Whether there is one of that name, which is not read for it."""
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array, which is not read for it; raises a `UserError` where there is none."""
        return self._due(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of an array as it is read, which it is not for this; raises a `UserError` where there is none."""
        return self._due(name).dtype

    def _due(self, name: str) -> Stored:
        if name not in self._stored:
            raise UserError(f"{self.path} lacks {name}: it is of another layout, or not all of it is there")
        return self._stored[name]

    def renamed(self, name: Callable[[str], str]) -> "Tensors":
        """The same arrays by other names.

        Raises:
          UserError: two of them would have one name.
        """
        stored: dict[str, Stored] = {}
        for key, array in self._stored.items():
            if name(key) in stored:
                raise UserError(f"{self.path} holds {name(key)} twice, once by another name: keep one of them")
            stored[name(key)] = array
        return Tensors(self.path, stored, self.facts)

    def under(self, prefix: str) -> "Tensors":
        """Those whose names begin so, by what follows."""
        stored = {key.removeprefix(prefix): array for key, array in self._stored.items() if key.startswith(prefix)}
        return Tensors(self.path / prefix, stored, self.facts)


def joined(path: Path, parts: Mapping[str, Tensors]) -> Tensors:
    """The inverse, of several: each array by what its part's names are to begin with, and its own."""
    stored = {prefix + key: array for prefix, part in parts.items() for key, array in part._stored.items()}
    return Tensors(path, stored)


def computed_in(tensors: Tensors, key: str) -> Literal["float32", "bfloat16"]:
    """The type of the computation, by one of the arrays: bfloat16 of such weights."""
    return "bfloat16" if tensors.dtype(key) == BFLOAT16 else "float32"


def open_tensors(path: Path) -> Tensors:
    """The arrays of a file, or of the files of a directory as they are published.

    Raises:
      UserError: there are none, or they are pickles, or a file is damaged, or an index names what is not beside it.
    """
    path = weights_of(path) if path.is_dir() else path
    refuse_pickle(path)
    readers = {".safetensors": open_safetensors, ".npz": open_npz, ".gguf": open_gguf, ".json": open_shards}
    if path.suffix not in readers:
        raise UserError(f"{path} is no file of weights that can be read here: give a safetensors file, npz or GGUF")
    if not path.is_file():
        raise UserError(f"{path} is not there: give the file of the weights, or the directory that it is in")
    return readers[path.suffix](path)


def weights_of(directory: Path) -> Path:
    """The file of weights in a directory, or the index of several; of variants the one that bears no name of its own.

    Raises:
      UserError: there is none, or one cannot tell which.
    """
    there = sorted(path for path in directory.iterdir() if path.is_file())
    for suffix in (INDEX, ".safetensors", ".gguf", ".npz"):
        found = [path for path in there if path.name.endswith(suffix)]
        plain = [path for path in found if path.name.removesuffix(suffix) in PLAIN]
        if len(found) == 1 or len(plain) == 1:
            return (plain or found)[0]
        if found:
            names = ", ".join(path.name for path in found[:3])
            raise UserError(f"{directory} holds {len(found)} files of weights ({names}): name the one to be read")
    for path in there:
        refuse_pickle(path)
    raise UserError(f"{directory} holds no weights: none of its files is a safetensors file, npz or GGUF")


def refuse_pickle(path: Path) -> None:
    """Raises a `UserError` for a file that could run a program as it is read, and says what makes another of it."""
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a pickle, which is not read here: where torch is, run {unpickled(path.name)}")


def unpickled(name: str) -> str:
    """The command that makes a safetensors file of a pickle beside it."""
    return (
        f'python -c "import torch, safetensors.torch as s; '
        f"t = torch.load('{name}', 'cpu', weights_only=True); t = t.get('state_dict', t.get('model', t)); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in t.items()}}, "
        f"'{Path(name).with_suffix('.safetensors')}')\""
    )


def open_safetensors(path: Path) -> Tensors:
    """The library maps the file, and compares its header with its length."""
    try:
        file = safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file, or not all of one ({error}): fetch it again") from error
    kinds = FLOATS | INTEGERS
    for name, found in slices.items():
        if found.get_dtype() not in kinds:
            raise UserError(f"{name} in {path} is of {found.get_dtype()}: give a file of {', '.join(FLOATS)}")
    stored = {
        name: Stored(tuple(found.get_shape()), kinds[found.get_dtype()], partial(file.get_tensor, name))
        for name, found in slices.items()
    }
    return Tensors(path, stored)


def open_shards(index: Path) -> Tensors:
    """The safetensors files beside an index, which says what each of them holds."""
    try:
        weight_map = parse_json(index.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors files ({error!r}): fetch it again") from error
    shards: dict[str, Tensors] = {}
    for file in sorted(set(files.values())):
        # A name with a directory in it could be any file of this machine.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index} names {file!r}: it must name safetensors files beside it, and nothing else")
        shards[file] = open_tensors(index.parent / file)
    for name, file in files.items():
        if name not in shards[file]:
            raise UserError(f"{index} places {name} in {file}, which lacks it: fetch both again")
    if unknown := next((f"{name} in {file}" for file in shards for name in shards[file] if name not in files), None):
        raise UserError(f"{index} does not know of {unknown}: fetch both again")
    return Tensors(index, {name: shards[file]._stored[name] for name, file in files.items()})


def open_npz(path: Path) -> Tensors:
    """Of each array the header is read now; bfloat16, which NumPy writes as bytes without a meaning, gets it back."""
    try:
        with zipfile.ZipFile(path) as file:
            stored = {name.removesuffix(".npy"): _stored_npy(path, file, name) for name in file.namelist()}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is no npz file, or not all of one ({error}): fetch it again") from error
    return Tensors(path, stored)


def _stored_npy(path: Path, file: zipfile.ZipFile, member: str) -> Stored:
    with file.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(opened)
    if dtype.hasobject:
        raise UserError(f"{member} in {path} is a pickle, which is not read here: save numbers alone")
    kind = BFLOAT16 if dtype == np.dtype("V2") else dtype

    def read() -> np.ndarray:
        with zipfile.ZipFile(path) as file, file.open(member) as opened:
            return np.lib.format.read_array(opened, allow_pickle=False).view(kind)

    return Stored(shape, kind, read)


class _Reader(gguf.GGUFReader):
    """Stops where the file ends, and reads arrays of numbers at once: a flipped length would keep it busy for hours."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        kind = np.dtype(dtype)
        start, end = int(offset), int(offset) + kind.itemsize * int(count)
        if not 0 <= start <= end <= len(self.data):
            raise ValueError(f"{count} values at byte {offset} reach beyond its end")
        # Not a slice of the memmap, which takes ten times as long: there are a hundred thousand tokens and merges.
        return np.asarray(self.data)[start:end].view(kind.newbyteorder(override_order or self.byte_order))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if gguf.GGUFValueType(raw_type) == gguf.GGUFValueType.ARRAY:
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            of = gguf.GGUFValueType(kind[0])
            if of in self.gguf_scalar_to_np:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[of], length[0])
                return 12 + values.nbytes, [kind, length, values], [2], [gguf.GGUFValueType.ARRAY, of]
        return super()._get_field_parts(orig_offs, raw_type)


def open_gguf(path: Path) -> Tensors:
    """The arrays by llama.cpp's names, [rows, columns] as in PyTorch, and the metadata as `facts`."""
    try:
        file = _Reader(path)
        facts = {name: field.contents() for name, field in file.fields.items()}
        stored = {tensor.name: _stored(tensor) for tensor in file.tensors}
    except NotImplementedError as error:
        raise UserError(f"{path} is quantised in a way that is not known here ({error}): give another file") from error
    except (OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is no GGUF, or not all of one, or of a kind unknown here ({error})") from error
    return Tensors(path, stored, facts)


def _stored(tensor: gguf.ReaderTensor) -> Stored:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kind = tensor.tensor_type
    if kind == gguf.GGMLQuantizationType.BF16:
        return Stored(shape, BFLOAT16, lambda: tensor.data.view(BFLOAT16).reshape(shape))
    if tensor.data.dtype != np.uint8:
        return Stored(shape, tensor.data.dtype, lambda: np.array(tensor.data))
    gguf.dequantize(tensor.data.reshape(-1)[: gguf.GGML_QUANT_SIZES[kind][1]], kind)  # one block: whether it can
    return Stored(shape, np.dtype(np.float32), lambda: gguf.dequantize(tensor.data, kind).reshape(shape))
