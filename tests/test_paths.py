"""What a person writes for a path is text, and stands for something on this machine."""

import os
import pwd
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import run
from vlm_jax.commandline import command
from vlm_jax.errors import UserError
from vlm_jax.paths import cache_directory, local_path


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as an arbitrary user: no HOME, and none in the list of users."""

    def unknown(*_: Any) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


@pytest.mark.parametrize(
    "text", ["runs/seed[0]", "a*?\\b", "./~", "./~/x", "$HOME", "%20", "-", "a b", "~nobody-here/x"]
)
def test_a_path_is_text(text: str) -> None:
    assert local_path(text) == Path(text)
    assert local_path(Path("/") / text) == Path("/") / text


def test_a_leading_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~") == tmp_path
    assert local_path("~/runs/a") == local_path(Path("~/runs/a")) == tmp_path / "runs" / "a"


@pytest.mark.parametrize("text", ["gs://bucket/x", "s3://bucket/x", "https://host/x", "file:///x", Path("gs://bucket")])
def test_an_address_is_no_path(text: str | Path) -> None:
    with pytest.raises(UserError, match=r"is not a directory or file of this machine: mount it, and give the path of"):
        local_path(text)


def test_a_mount_that_would_be_taken_for_an_address_is_refused() -> None:
    with pytest.raises(UserError, match=r"^/s3/data would be taken for the address of a bucket, for its /s3/: give a"):
        local_path("/s3/data")
    assert local_path("/mnt/s3/data") == Path("/mnt/s3/data")


def test_a_path_that_is_not_utf8_is_refused() -> None:
    """Records are JSON, which could not hold it."""
    with pytest.raises(UserError, match=r"the path 'a\\udcff' is not UTF-8: choose another name"):
        local_path(os.fsdecode(b"a\xff"))


def test_without_a_home_directory_a_tilde_is_told(homeless: None) -> None:
    for text in ("~/.cache/vlm_jax/data", "~"):
        with pytest.raises(UserError, match=rf"there is no home directory for {text}: set HOME, or give a path"):
            local_path(text)
    assert local_path("/data") == Path("/data")


def test_without_a_home_directory_nothing_is_cached(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() is None


@pytest.mark.parametrize(
    ("given", "expected"), [("/cache", "/cache"), ("", "/home/me/.cache"), ("a", "/home/me/.cache")]
)
def test_the_cache_is_where_its_variable_says_if_that_is_a_place(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are to be ignored, says the specification."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_directory() == Path(expected)


def test_a_command_without_a_home_directory_says_what_to_give(
    homeless: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "argv", ["run", "vae-tiny", "--workdir", "/dev/null/run"])
    with pytest.raises(SystemExit) as ended, command():
        run.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: there is no home directory for ~/.cache/vlm_jax/data: set HOME, or give a path without ~\n"
    )
