"""The terminal that a run was started from: what is shown there, and the signals that come from there."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm
from tqdm.utils import ObjectWrapper


class StopSignal:
    """Notices SIGTERM and Ctrl-C, for the loop to end between two steps; several processes end at the same one.

    The second Ctrl-C ends the process at once, whatever it is waiting for.
    """

    def __enter__(self) -> Self:
        self.noticed = False
        self._received = False
        self._polls = 0
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_writer = signal.set_wakeup_fd(self._writer)
        # With several processes jax.distributed listens for SIGTERM itself, and agrees on the moment.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        threading.Thread(target=count_interrupts, args=(reader,), daemon=True).start()
        return self

    def poll(self) -> bool:
        """Whether to stop, once and for all. All processes call this equally often, and stop at the same call."""
        self._polls += 1
        if jax.process_count() > 1:
            self._received |= multihost_utils.reached_preemption_sync_point(self._polls)
        self.noticed = self._received
        return self.noticed

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if jax.process_count() == 1:
            self._received = True
        else:
            signal.raise_signal(signal.SIGTERM)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_writer)
        os.close(self._writer)  # which ends the thread


def count_interrupts(reader: int) -> None:
    """Answers each Ctrl-C at once, by a thread that reads the numbers of the signals from a pipe.

    Python runs a signal's handler when the main thread comes back to it, which may be minutes later: from a compiler,
    or from a device that waits for others.
    """
    interrupts = 0
    with open(reader, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            interrupts += number[0] == signal.SIGINT
            if interrupts == 2:
                os._exit(128 + signal.SIGINT)
            if number[0] == signal.SIGINT:
                say("stopping as soon as what was trained is saved; Ctrl-C once more stops at once, without saving")


class Terminal(ObjectWrapper):
    """Standard error, for what no run should end for: it may be a closed window, or a file on a full disk."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._wrapped.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._wrapped.flush()


def progress_bar(start: int, steps: int) -> tqdm:
    """Steps done, time left, and what the loop adds; on the first process alone."""
    return tqdm(
        file=Terminal(sys.stderr),
        total=steps,
        initial=start,
        unit="step",
        dynamic_ncols=True,
        disable=jax.process_index() != 0,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )


def say(message: str) -> None:
    """A line for the person who started the run, once."""
    if jax.process_index() == 0:
        try:
            print(message, flush=True)
        except OSError:  # what is left of it would be tried again, and raise, as Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
