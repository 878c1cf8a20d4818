"""A file is replaced by a whole one or left as it was; a sheet draws captions as they are written."""

import os
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vlm_jax.errors import UserError
from vlm_jax.files import check_writable, replace_file, write_output
from vlm_jax.sheets import draw, write_sheet


class Killed(BaseException):
    """Stands for what ends a process without a word."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed(), KeyboardInterrupt()])
@pytest.mark.parametrize("before", ["old", None])
def test_a_write_cut_short_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, error: BaseException, before: str | None
) -> None:
    path = tmp_path / "figure.png"
    if before is not None:
        path.write_text(before)

    def cut_short(temporary: Path) -> None:
        temporary.write_text("ha")
        raise error

    with pytest.raises(type(error)):
        replace_file(path, cut_short)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"figure.png": before} if before else {})


def test_the_new_file_has_the_name_and_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "ordinary.txt").write_text("")
    suffixes = []

    def write(temporary: Path) -> None:
        suffixes.append(temporary.suffix)
        temporary.write_text("new")

    for _ in range(2):
        replace_file(tmp_path / "table.json", write)
    assert {file.name for file in tmp_path.iterdir()} == {"ordinary.txt", "table.json"}
    assert (tmp_path / "table.json").read_text() == "new"
    assert (tmp_path / "table.json").stat().st_mode == (tmp_path / "ordinary.txt").stat().st_mode
    assert suffixes == [".json", ".json"]  # by which a library may choose the format


def test_a_link_stays_and_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("target.txt")
    replace_file(tmp_path / "link.txt", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "target.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_file(tmp_path / "pipe", lambda temporary: temporary.write_text("through"))
    assert os.read(reader, 100) == b"through"
    assert (tmp_path / "pipe").is_fifo()
    os.close(reader)
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path, lambda temporary: temporary.write_text("new"))


def full(path: Path) -> None:
    path.write_text("ha")
    raise OSError(28, os.strerror(28))


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_output(path, lambda temporary: temporary.write_text("whole"))
    with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\): choose another place"):
        write_output(path, full)
    assert path.read_text() == "whole"
    with pytest.raises(KeyError):
        write_output(path, lambda temporary: {}["fault of ours"])
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("check", [check_writable, lambda path: write_output(path, Path.touch)])
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
    figure = draw([(caption, [(np.zeros((2, 2, 1), np.uint8), caption)])], 256)
    figure.savefig(tmp_path / "shown.png", format="png", dpi=110)  # as a notebook does
    with Image.open(tmp_path / "shown.png") as image:
        np.testing.assert_array_equal(sheet, np.asarray(image))


def test_what_has_no_glyph_is_marked(tmp_path: Path) -> None:
    """As an untrained model of bytes writes; a warning would be an error here."""
    np.testing.assert_array_equal(pixels(tmp_path / "a", "a\x1e\x00b"), pixels(tmp_path / "b", "a\ufffd\ufffdb"))
