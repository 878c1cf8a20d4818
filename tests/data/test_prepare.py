import errno
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest
import tensorflow_datasets as tfds

from made import build
from vlm_jax.data import open_source
from vlm_jax.data.digits import Digits
from vlm_jax.data.prepare import own_names, prepare
from vlm_jax.errors import UserError
from vlm_jax.locks import exclusive

KILLED_MIDWAY = """
import os, signal, sys
from pathlib import Path
from vlm_jax.data.digits import Digits
from vlm_jax.data.prepare import prepare

generate = Digits._generate_examples

def die_after_100(self, images, labels, indices):
    for number, example in enumerate(generate(self, images, labels, indices)):
        if number == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

Digits._generate_examples = die_after_100
prepare("digits", Path(sys.argv[1]))
"""


@pytest.fixture
def generated(monkeypatch):
    """The sizes of the splits of digits that were generated."""
    sizes = []
    generate = Digits._generate_examples

    def counted(self, images, labels, indices):
        sizes.append(len(indices))
        return generate(self, images, labels, indices)

    monkeypatch.setattr(Digits, "_generate_examples", counted)
    return sizes


def test_own_names():
    assert own_names() == [
        "openmoji",
        "easy_vqa/questions",
        "easy_vqa/dialogues",
        "easy_vqa/captions",
        "easy_vqa/color",
        "easy_vqa/shape",
        "mosaic/questions",
        "mosaic/dialogues",
        "mosaic/captions",
        "digits",
    ]


def test_a_data_set_is_prepared_once(tmp_path, generated):
    assert prepare("digits", tmp_path) == prepare("digits", tmp_path) == tmp_path / "digits" / "1.0.0"
    assert sorted(generated) == [180, 360, 1257]


def test_simultaneous_first_uses_prepare_once(tmp_path, generated):
    with ThreadPoolExecutor(4) as threads:
        sizes = list(threads.map(lambda _: len(open_source("digits", "test", tmp_path)), range(4)))
    assert sizes == [360] * 4
    assert sorted(generated) == [180, 360, 1257]


def test_a_killed_preparation_is_done_again(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED_MIDWAY, str(tmp_path)], capture_output=True, timeout=120)
    assert run.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "digits").iterdir()
    assert leftover.name.startswith("incomplete")

    assert len(open_source("digits", "train", tmp_path)) == 1257
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_preparing_is_silent_on_stdout(tmp_path, capfd):
    prepare("digits", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_data_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"digits cannot be prepared in .*/file \(.*\): choose another data directory"):
        prepare("digits", tmp_path / "file")


def test_beside_a_read_only_directory_of_others_data_sets_ours_are_in_the_cache(tmp_path, monkeypatch):
    """One `data_dir` serves for both, and by the full name the same is found again."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shared = tmp_path / "shared"
    build(shared, {"text": tfds.features.Text()}, {"text": "a"})
    shared.chmod(0o555)
    source = open_source("digits", "test", shared)
    assert source.directory == tmp_path / ".cache" / "vlm_jax" / "data" / "digits" / "1.0.0"
    assert source.full_name == "digits:1.0.0"
    assert open_source(source.full_name, "test", shared).directory == source.directory
    assert list(open_source("made", "train", shared).texts()) == ["a"]
    assert not (shared / "digits").exists()
    shared.chmod(0o755)
    assert prepare("digits", shared) == shared / "digits" / "1.0.0"
    shared.chmod(0o555)
    assert prepare("digits", shared) == shared / "digits" / "1.0.0"  # where it is there already


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, caplog, generated, number):
    def lockless(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", lockless)
    with ThreadPoolExecutor(2) as threads:
        sizes = list(threads.map(lambda _: len(open_source("digits", "test", tmp_path)), range(2)))
    assert sizes == [360] * 2
    assert sorted(generated) == [180, 360, 1257]
    assert caplog.messages[0].endswith(f"no locks ({os.strerror(number)}): {tmp_path}/digits.lock.soft stands for one")


def test_who_waits_for_a_dead_process_is_told_what_to_delete(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_jax.data.prepare.exclusive", lambda path, timeout: exclusive(path, timeout / 1e5))
    message = rf"preparing digits in .* if none does, delete {tmp_path}/digits\.lock$"
    with filelock.FileLock(tmp_path / "digits.lock"), pytest.raises(UserError, match=message):
        prepare("digits", tmp_path)
