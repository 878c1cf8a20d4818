"""The record of a run's metrics: `metrics.jsonl` and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends one JSON object a logged step to `WORKDIR/metrics.jsonl`, and the same to TensorBoard.

    On opening, what was logged after step `start` is dropped: those steps run again, and each must stand there once.
    """

    def __init__(self, workdir: Path, start: int, *, enabled: bool = True):
        self.enabled = enabled
        if not enabled:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        keep_until(path, start)
        self.file = path.open("a")
        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self.file.close()
            self.writer.close()


def keep_until(path: Path, step: int) -> None:
    """Rewrites a metrics file without the lines after `step` and without a last line cut short by a kill."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().split("\n")[:-1] if json.loads(line)["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)
