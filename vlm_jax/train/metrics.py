"""The record of a run's metrics: `metrics.jsonl` and TensorBoard events. No run stops or waits for want of them."""

import contextlib
import io
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from vlm_jax.files import parse_json, replace_file

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object a logged step to `WORKDIR/metrics.jsonl`, and the same to TensorBoard.

    On opening, what was logged after step `start` is dropped: those steps run again, and each must stand there once.
    """

    def __init__(self, workdir: Path, start: int, *, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        lines = workdir / "metrics.jsonl"
        # tensorboardX's own writer has a thread, which dies of a full disk and leaves its caller waiting.
        events = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._lines = LogFile(lines, lambda: keep_until(lines, start))
        self._events = LogFile(workdir / "tensorboard" / events)
        self._add_event(file_version="brain.Event:2")
        self._add_event(
            step=start + 1, session_log=SessionLog(status=SessionLog.START)
        )  # hides what it holds from there

    def write(self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray] = {}) -> None:
        """Adds the metrics of a step; one that is not finite is null in JSON, which knows no such numbers.

        Args:
          pictures: uint8 [H, W, 3], for TensorBoard alone.
        """
        if not self._enabled:
            return
        self._lines.append(msgspec.json.encode({"step": step, **values}) + b"\n")
        shown = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        shown += [Summary.Value(tag=name, image=as_png(pixels)) for name, pixels in pictures.items()]
        self._add_event(step=step, summary=Summary(value=shown))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            self._lines.close()
            self._events.close()

    def _add_event(self, **fields: Any) -> None:
        self._events.append(tfrecord(Event(wall_time=time.time(), **fields).SerializeToString()))


class LogFile:
    """A file that entries are added to, each of them whole or not at all.

    What cannot be written is left out, which is told once; the next entry is tried again, for there may be room by
    then. A file that cannot be opened stays left out.

    Args:
      prepare: is called before the file is opened, and may fail likewise.
    """

    def __init__(self, path: Path, prepare: Callable[[], None] = lambda: None):
        self._path = path
        self._descriptor: int | None = None
        self._told = False
        with self._failure_told():
            path.parent.mkdir(parents=True, exist_ok=True)
            prepare()
            # Without O_NONBLOCK, a pipe in its place would be waited for.
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)

    def append(self, entry: bytes) -> None:
        if self._descriptor is None:
            return
        with self._failure_told():
            end = os.lseek(self._descriptor, 0, os.SEEK_END)
            try:
                while entry:
                    entry = entry[os.write(self._descriptor, entry) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, end)  # half an entry would spoil the next
                raise

    def close(self) -> None:
        if self._descriptor is not None:
            with self._failure_told():
                os.close(self._descriptor)

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._told:
                logger.warning(f"{self._path} cannot be written ({error.strerror}): the run goes on without it")
            self._told = True


def keep_until(path: Path, step: int) -> None:
    """Rewrites a metrics file without the lines after `step`, and without what a kill or a crash left that is none."""
    if not path.is_file():
        return
    lines = path.read_text(errors="replace").split("\n")
    kept = "".join(f"{line}\n" for line in lines if 0 <= step_of(line) <= step)
    replace_file(path, lambda temporary: temporary.write_text(kept))


def step_of(line: str) -> int:
    """The step of a line of a metrics file; -1 if it is none."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return -1


def as_png(pixels: np.ndarray) -> Summary.Image:
    """What TensorBoard shows of uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    height, width, channels = pixels.shape
    return Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=file.getvalue())


def tfrecord(data: bytes) -> bytes:
    """The framing of TensorFlow's record files: length, its checksum, the data, their checksum; little-endian."""
    length = struct.pack("<Q", len(data))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))])
