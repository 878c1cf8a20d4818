"""The record of metrics: each step once, each entry whole, and nothing that stops a run."""

import errno
import io
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from vlm_jax.train.metrics import LogFile, MetricsLog


def lines(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir: Path) -> list[Event]:
    """The events of the one file there, every one of them whole."""
    (path,) = (workdir / "tensorboard").iterdir()
    assert "tfevents" in path.name  # by which TensorBoard finds it
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        (of_length, event, of_event), data = (
            (data[8:12], data[12 : 12 + length], data[12 + length :][:4]),
            data[16 + length :],
        )
        assert [struct.unpack("<I", crc)[0] for crc in (of_length, of_event)] == [
            masked_crc32c(struct.pack("<Q", length)),
            masked_crc32c(event),
        ]
        found.append(Event.FromString(event))
    return found


def full_disk(room: int) -> Callable[[int, bytes], int]:
    """An `os.write` that writes what there is room for, as the system's does, and fails from then on."""
    write = os.write

    def limited(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[:room])
        room -= written
        return written

    return limited


def test_both_logs_hold_each_value(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 6) as log:
        log.write(7, {"loss": 0.1, "rate": 1e-7})
        log.write(8, {"loss": 3.0, "rate": 2e-7})
    assert lines(tmp_path) == [{"step": 7, "loss": 0.1, "rate": 1e-7}, {"step": 8, "loss": 3.0, "rate": 2e-7}]
    version, start, *rest = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, SessionLog.START)  # hides steps from 7 on of earlier files
    shown = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in rest]
    assert shown == [
        (7, pytest.approx({"loss": 0.1, "rate": 1e-7}, rel=1e-6)),
        (8, pytest.approx({"loss": 3.0, "rate": 2e-7}, rel=1e-6)),
    ]


def test_pictures_are_for_tensorboard_and_lose_nothing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 0.5}, {"sheet": pixels})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    loss, sheet = events(tmp_path)[-1].summary.value
    assert (loss.tag, sheet.tag, sheet.image.height, sheet.image.width) == ("loss", "sheet", 4, 6)
    np.testing.assert_array_equal(Image.open(io.BytesIO(sheet.image.encoded_image_string)), pixels)


def test_a_metric_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """JSON has no word for it, and strict readers refuse Python's."""
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"a": math.nan, "b": -math.inf, "c": 1.0})
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]


ODD = {
    "nothing": b"",
    "blank": b"\n",
    "NUL": b"\0" * 100,
    "NUL and an end": b"\0" * 100 + b"\n",
    "half a line": b'{"step": 2, "lo',
    "half a line and an end": b'{"step": 2, "lo\n',
    "other JSON": b"3\nnull\n[1]\n{}\n",
    "other steps": b'{"step": null}\n{"step": "two"}\n{"step": NaN}\n{"step": Infinity}\n',
    "no text": b"\xff\xfe\n",
    "nested too deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("where", ["between", "last"])
def test_what_is_no_line_is_dropped_and_the_rest_kept(tmp_path: Path, odd: bytes, where: str) -> None:
    first, second, late = b'{"step":1,"loss":0.5}\n', b'{"step":2,"loss":0.25}\n', b'{"step":3,"loss":0.1}\n'
    odd_line = odd if odd.endswith(b"\n") or where == "last" else odd + b"\n"
    content = first + odd_line + second + late if where == "between" else first + second + late + odd_line
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with MetricsLog(tmp_path, 2) as log:
        log.write(3, {"loss": 0.125})
    assert (tmp_path / "metrics.jsonl").read_bytes() == first + second + b'{"step":3,"loss":0.125}\n'


def test_a_full_disk_costs_entries_and_never_a_part_of_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once for each log; as soon as there is room again, entries are written again."""
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 0.5})
        for room in (5, len('{"step":2,"loss":0.25}\n') + 5, 0):
            with monkeypatch.context() as patched:
                patched.setattr(os, "write", full_disk(room))
                log.write(2, {"loss": 0.25})
        log.write(3, {"loss": 0.125})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]  # there was room for the second once
    assert [event.step for event in events(tmp_path)] == [0, 1, 1, 3]
    (path,) = (tmp_path / "tensorboard").iterdir()
    reason = "cannot be written (No space left on device): the run goes on without it"
    assert caplog.messages == [f"{file} {reason}" for file in (tmp_path / "metrics.jsonl", path)]


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [Path.mkdir, a_pipe], ids=["directory", "pipe"])
def test_what_cannot_be_opened_is_told_and_the_other_log_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: object
) -> None:
    make(tmp_path / "metrics.jsonl")
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 0.5})
    assert [event.step for event in events(tmp_path)] == [0, 1, 1]
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/metrics.jsonl cannot be written (")


def test_a_file_in_place_of_the_events_costs_them_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("")
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"loss": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert len(caplog.messages) == 1 and "tensorboard" in caplog.messages[0]


def test_a_file_that_is_added_to_keeps_what_it_held(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"old ")
    file = LogFile(tmp_path / "log")
    file.append(b"new")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"old new"
