"""Files are whole, and captions are drawn as they are written."""

import os
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vlm_jax.errors import UserError
from vlm_jax.files import check_writable, replace_file
from vlm_jax.sheets import write_sheet


def full(path: Path) -> None:
    path.write_text("ha")
    raise OSError(28, os.strerror(28))


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    replace_file(path, lambda temporary: temporary.write_text("whole"))
    with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\): choose another place"):
        replace_file(path, full)
    assert path.read_text() == "whole"
    with pytest.raises(KeyError):
        replace_file(path, lambda temporary: {}["fault of ours"])
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("check", [check_writable, lambda path: replace_file(path, Path.touch)])
def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path, check: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match="directory"):
        check(tmp_path / "directory")
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        check(tmp_path / "file" / "below")
    check(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_a_check_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def pixels(path: Path, caption: str) -> np.ndarray:
    cell = (np.zeros((2, 2, 1), np.uint8), caption)
    write_sheet([(caption, [cell])], path)
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("caption", ["$\\frac{$", "costs $5 or $6", "a_b^c \\$", "{} {x} %s %(x)d [bold]"])
def test_signs_in_a_caption_are_drawn_and_not_read(tmp_path: Path, caption: str) -> None:
    """As mathematics a pair of dollars would vanish, and an unknown command would be a traceback."""
    sheet = pixels(tmp_path / "sheet.png", caption)
    with matplotlib.rc_context({"text.parse_math": False}):
        np.testing.assert_array_equal(sheet, pixels(tmp_path / "literal.png", caption))
