"""A checkpoint knows to what run it belongs, and what it was saved as."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.train.checkpoint import Checkpoints

IDENTITY = {"model.levels": "17", "tokenizer.json": "a1"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template") / "checkpoints"
    with Checkpoints(directory, identity=IDENTITY) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, {"step": np.int32(step)})
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    """Checkpoints 4 and 8 of one run, to be mixed up."""
    return shutil.copytree(template, tmp_path / "checkpoints")


def abstract() -> dict[str, Any]:
    return {"step": jax.ShapeDtypeStruct((), np.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}


@pytest.mark.parametrize("read_only", [True, False])
def test_checkpoints_open_beside_the_facts_that_they_were_written_with_and_no_others(
    directory: Path, read_only: bool
) -> None:
    with Checkpoints(directory, read_only=read_only, identity=IDENTITY) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 8
    for other, told in (
        (IDENTITY | {"model.levels": "25"}, "model.levels: 17 -> 25"),
        (IDENTITY | {"model.bogus": "1"}, "model.bogus: absent -> 1"),
        ({"model.levels": "17"}, "tokenizer.json: a1 -> absent"),
    ):
        with pytest.raises(UserError, match=rf"/4 was not written with the config\.json .* \({told}\): bring back"):
            Checkpoints(directory, read_only=read_only, identity=other)
    with Checkpoints(directory, read_only=True) as checkpoints:  # who knows no facts compares none
        assert checkpoints.steps() == (4, 8)


def test_a_checkpoint_of_another_run_is_refused_under_any_name(directory: Path, tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "other", identity=IDENTITY | {"seed": "1"}) as checkpoints:
        checkpoints.save(12, {"step": np.int32(12)})
    shutil.copytree(tmp_path / "other" / "12", directory / "12")
    with pytest.raises(UserError, match=r"/12 was not written with .*\(seed: 1 -> absent\).* or move it elsewhere"):
        Checkpoints(directory, identity=IDENTITY)
    assert (directory / "12").exists()


def test_a_checkpoint_of_another_name_is_refused(directory: Path) -> None:
    (directory / "8").rename(directory / "16")
    with pytest.raises(UserError, match=r"/16 is checkpoint 8 under another name: give it that name back"):
        Checkpoints(directory, read_only=True)
    (directory / "16").rename(directory / "8")
    with Checkpoints(directory, identity=IDENTITY) as checkpoints:
        assert checkpoints.restore(abstract())[0] == 8


def test_many_differences_are_told_in_a_sentence_of_readable_length(directory: Path) -> None:
    with pytest.raises(UserError, match=r"\(a0: absent -> 1; .*a12: absent -> 1; and 37 more\)"):
        Checkpoints(directory, read_only=True, identity={f"a{i}": "1" for i in range(40)})
