"""Containers of published weights: what is in them is read as it was written, and what is damaged is refused."""

import json
import re
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from vlm_jax.errors import UserError
from vlm_jax.pretrained.tensors import open_tensors

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "b": RANDOM.normal(size=(2, 3)).astype(jnp.bfloat16),
    "f": RANDOM.normal(size=(3, 64)).astype(np.float32),
    "h": RANDOM.normal(size=()).astype(np.float16),
    "i": np.arange(4)[None],
}
WEIGHTS = {name: array for name, array in ARRAYS.items() if name != "i"}


def write_shards(directory: Path) -> Path:
    """Two files and their index."""
    directory.mkdir(exist_ok=True)
    shards = {"one.safetensors": ["b", "i"], "two.safetensors": ["f", "h"]}
    for file, names in shards.items():
        save_file({name: ARRAYS[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_gguf(path: Path, *, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0) -> Path:
    """One array quantised, one as it is, and facts of several types."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "bc"])
    writer.add_token_types([1, 3])
    writer.add_tensor("f", gguf.quantize(ARRAYS["f"], kind), raw_dtype=kind)
    bits = ARRAYS["b"].view(np.uint8)
    writer.add_tensor("b", bits, raw_shape=bits.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def assert_reads(path: Path, arrays: dict[str, np.ndarray]) -> None:
    tensors = open_tensors(path)
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert (tensors.shape(name), tensors.dtype(name)) == (array.shape, array.dtype)
        np.testing.assert_array_equal(tensors[name], array)
    for ask in (tensors.shape, tensors.dtype):
        with pytest.raises(UserError, match=r"lacks head\.weight: it is of another layout, or not all of it is there"):
            ask("head.weight")


def test_what_was_written_is_read_from_every_container(tmp_path: Path):
    save_file(ARRAYS, tmp_path / "one.safetensors")
    assert_reads(tmp_path / "one.safetensors", ARRAYS)
    assert_reads(tmp_path, ARRAYS)
    assert_reads(write_shards(tmp_path / "shards"), ARRAYS)
    np.savez(tmp_path / "a.npz", **ARRAYS)  # of which NumPy writes bfloat16 as bytes without a meaning
    assert_reads(tmp_path / "a.npz", ARRAYS)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_quantised_values_are_read_as_the_nearest_that_their_type_has(name: str, tmp_path: Path):
    kind = gguf.GGMLQuantizationType[name]
    tensors = open_tensors(write_gguf(tmp_path / "a.gguf", kind=kind))
    assert (tensors.shape("f"), tensors.dtype("f")) == ((3, 64), np.float32)
    step = {"Q4_0": 16, "Q4_1": 15, "Q5_0": 32, "Q8_0": 255}[name]
    blocks = tensors["f"].reshape(-1, 32), ARRAYS["f"].reshape(-1, 32)
    widest = 2 * np.abs(blocks[1]).max(axis=1, keepdims=True) / step
    assert (np.abs(blocks[0] - blocks[1]) <= widest * 1.02).all()
    np.testing.assert_array_equal(tensors["b"], ARRAYS["b"])
    facts = {"llama.context_length": 77, "tokenizer.ggml.tokens": ["a", "bc"], "tokenizer.ggml.token_type": [1, 3]}
    assert {name: tensors.facts[name] for name in facts} == facts


def refused(path: Path) -> str:
    with pytest.raises(UserError) as refusal:
        dict(open_tensors(path))
    message = str(refusal.value)
    assert "\n" not in message.strip() and path.name in message
    return message


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth"])
def test_a_pickle_is_refused_with_the_command_that_makes_another_file_of_it(suffix: str, tmp_path: Path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"\x80\x04.")
    command = r"run python -c \".*weights_only=True.*'weights\.safetensors'.*\""
    assert re.search(command.replace('\\"', '"'), refused(path))
    with pytest.raises(UserError, match=r"is a pickle"):
        open_tensors(tmp_path)  # there is nothing else in it


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-3],
        lambda raw: raw[:6],
        lambda raw: raw + b"more",
        lambda raw: (10**9).to_bytes(8, "little") + raw[8:],
        lambda raw: raw.replace(b"[0,", b"[1,", 1),
        lambda raw: raw.replace(b'"F32"', b'"F8Q"', 1),
    ],
    ids=["truncated", "no header", "longer", "oversize header", "misaligned", "unknown type"],
)
def test_a_damaged_safetensors_file_is_refused(damage, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({"f": ARRAYS["f"]}, path)
    path.write_bytes(damage(path.read_bytes()))
    assert "is no safetensors file, or not all of one" in refused(path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", ".."])
def test_an_index_that_names_what_is_not_beside_it_is_refused(name: str, tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"f": name}}))
    assert f"names {name!r}: it must name safetensors files beside it" in refused(index)


def test_an_index_and_its_files_must_agree(tmp_path: Path):
    index = write_shards(tmp_path) / "model.safetensors.index.json"
    told = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": told | {"g": "one.safetensors"}}))
    assert "places g in one.safetensors, which lacks it" in refused(index)
    index.write_text(json.dumps({"weight_map": {"b": "one.safetensors"}}))
    assert "does not know of i in one.safetensors" in refused(index)
    index.write_text(json.dumps({"weight_map": told | {"i": "three.safetensors"}}))
    with pytest.raises(UserError, match=r"three\.safetensors is not there"):
        open_tensors(index)
    index.write_text("[]")
    assert "is no index" in refused(index)


def test_a_gguf_that_lies_of_its_lengths_is_refused_at_once(tmp_path: Path):
    """Of every byte of the header the highest bit: whatever is read is refused, or is what was written."""
    path = write_gguf(tmp_path / "a.gguf")
    raw = path.read_bytes()
    refusals = []
    for place in range(0, raw.index(b"tokenizer.ggml.token_type") + 60):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x80]) + raw[place + 1 :])
        try:
            open_tensors(path)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 100 and all("is no GGUF, or not all of one" in refusal for refusal in refusals)
    path.write_bytes(raw[:-40])
    assert "reach beyond its end" in refused(path)
    path.write_bytes(b"")
    assert "is no GGUF" in refused(path)


def test_a_gguf_of_an_unknown_quantisation_is_refused(tmp_path: Path):
    path = write_gguf(tmp_path / "a.gguf")
    raw = path.read_bytes()
    name = raw.index(b"\x01\x00\x00\x00\x00\x00\x00\x00f") + 9  # then two sizes, and the type
    place = name + 4 + 16
    assert int.from_bytes(raw[place : place + 4], "little") == gguf.GGMLQuantizationType.Q8_0
    for kind, words in ((200, "of a kind unknown here"), (int(gguf.GGMLQuantizationType.Q8_1), "not known here")):
        path.write_bytes(raw[:place] + kind.to_bytes(4, "little") + raw[place + 4 :])
        assert words in refused(path)


def test_a_damaged_npz_or_one_with_objects_is_refused(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez(path, f=ARRAYS["f"])
    raw = path.read_bytes()
    middle = raw.index(ARRAYS["f"].tobytes()) + 100
    path.write_bytes(raw[:middle] + b"xx" + raw[middle + 2 :])
    assert "Bad CRC-32" in refused(path)
    path.write_bytes(raw[:-30])
    assert "is no npz file" in refused(path)
    np.savez(path, o=np.array([{}]))
    assert "is a pickle" in refused(path)


def test_a_directory_of_several_or_of_none_is_refused(tmp_path: Path):
    assert "holds no weights" in refused(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(WEIGHTS, tmp_path / name)
    assert "holds 2 files of weights (a.safetensors, b.safetensors): name the one" in refused(tmp_path)
    with pytest.raises(UserError, match=r"x\.tar is no file of weights that can be read here"):
        open_tensors(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"x\.npz is not there"):
        open_tensors(tmp_path / "x.npz")
