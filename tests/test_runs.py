"""Whole runs through the command line: the same trajectory wherever they run, and whatever interrupts them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.presets import presets
from vlm_jax.trees import leaves_by_path
from vlm_jax.workdir import load

pytestmark = pytest.mark.slow

DIGITS = [name for name, (_, preset) in presets().items() if preset.data.name == "digits" and name != "vae-tiny"]
"""A preset of every family that learns images alone; the VAE's has a longer test."""
ROOT = Path(__file__).parent.parent
LAYOUTS = {
    "data": (),
    "fsdp": ("--mesh.data", "1", "--mesh.fsdp", "8"),
    "data, fsdp and tensor": ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"),
}
RUN = ("-m", "experiments.run")
INTERLEAVED = """
import jax
from jax.experimental import mesh_utils

arrange = mesh_utils.create_device_mesh


def interleaved(shape, devices, **options):
    hosts = map(jax.local_devices, range(jax.process_count()))
    return arrange(shape, [device for row in zip(*hosts) for device in row], **options)


mesh_utils.create_device_mesh = interleaved

from experiments.run import main
from vlm_jax.commandline import command

with command():
    main()
"""
"""`experiments.run` where neighbours in the network belong to other processes, as the hosts of a torus do."""


def start(
    preset: str, workdir: Path, data_dir: Path, *options: str, devices: int = 1, program: tuple[str, ...] = RUN
) -> subprocess.Popen:
    command = [sys.executable, *program, preset, "--workdir", str(workdir), "--data-dir", str(data_dir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        [*command, "--batch-size", "32", "--log-every", "1", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen, status: int = 0) -> str:
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), outputs
    assert "Traceback" not in "".join(outputs), outputs
    return "".join(outputs)


def start_pair(
    preset: str, workdir: Path, data_dir: Path, *options: str, program: tuple[str, ...] = RUN
) -> list[subprocess.Popen]:
    """Two processes with four devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    join = ("--distributed.coordinator", address, "--distributed.num-processes", "2", "--distributed.process-id")
    return [start(preset, workdir, data_dir, *options, *join, str(rank), devices=4, program=program) for rank in (0, 1)]


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(load(workdir).variables).items()}


def logged_steps(workdir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def validation_loss(workdir: Path) -> float | None:
    """Of the last step; None: the preset has no validation split."""
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1]).get("validation_loss")


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("preset", ["clip-tiny", "vae-tiny"])
def test_one_trajectory(preset: str, tmp_path: Path, data_dir: Path) -> None:
    """Ten steps on one device, on eight in three layouts, and on two processes of four, whose devices lie one beside
    the other and one between the other's.

    In CLIP the loss spans the global batch; in the VAE noise is drawn inside the loss.
    """
    finish(start(preset, tmp_path / "one", data_dir, "--steps", "10"))
    expected = parameters(tmp_path / "one")
    for name, options in LAYOUTS.items():
        finish(start(preset, tmp_path / name, data_dir, "--steps", "10", *options, devices=8))
        assert_close(parameters(tmp_path / name), expected)
    finish(*start_pair(preset, tmp_path / "pair", data_dir, "--steps", "10"))
    assert_close(parameters(tmp_path / "pair"), expected)
    program = ("-c", INTERLEAVED)
    finish(*start_pair(preset, tmp_path / "interleaved", data_dir, "--steps", "10", program=program))
    assert_close(parameters(tmp_path / "interleaved"), expected)
    assert validation_loss(tmp_path / "interleaved") == pytest.approx(validation_loss(tmp_path / "one"), abs=1e-4)


@pytest.mark.parametrize("preset", DIGITS)
def test_one_trajectory_of_every_family(preset: str, tmp_path: Path, data_dir: Path) -> None:
    """Five steps on one device, and on eight that split the batch, the parameters and the hidden units."""
    options = ["--steps", "5"]
    for i, first in enumerate(presets()[preset][1].start):  # a first stage, of five steps too
        name = Path(first.workdir).name
        finish(start(name, tmp_path / name, data_dir, "--steps", "5"))
        options += [f"--start.{i}.workdir", str(tmp_path / name)]
    finish(start(preset, tmp_path / "one", data_dir, *options))
    finish(start(preset, tmp_path / "eight", data_dir, *options, *LAYOUTS["data, fsdp and tensor"], devices=8))
    assert_close(parameters(tmp_path / "eight"), parameters(tmp_path / "one"))


def test_killed_twice_and_resumed_is_the_same_run(tmp_path: Path, data_dir: Path) -> None:
    """SIGKILL at random steps; the parameters are bit-identical and each step is logged once."""
    options = ("--steps", "60", "--checkpoint-every", "7")
    finish(start("clip-tiny", tmp_path / "whole", data_dir, *options))
    for kill_after in sorted(random.sample(range(8, 50), 2)):
        process = start("clip-tiny", tmp_path / "killed", data_dir, *options)
        metrics = tmp_path / "killed" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < kill_after:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.kill()
        process.communicate()
    finish(start("clip-tiny", tmp_path / "killed", data_dir, *options))
    actual, expected = parameters(tmp_path / "killed"), parameters(tmp_path / "whole")
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
    assert logged_steps(tmp_path / "killed") == logged_steps(tmp_path / "whole") == list(range(1, 61))


def test_goes_on_with_another_number_of_processes(tmp_path: Path, data_dir: Path) -> None:
    finish(start("vae-tiny", tmp_path / "whole", data_dir, "--steps", "12"))
    half = ("--optimizer.decay-steps", "12", "--steps", "6")
    finish(start("vae-tiny", tmp_path / "moved", data_dir, *half))
    finish(*start_pair("vae-tiny", tmp_path / "moved", data_dir, *half[:2], "--steps", "12"))
    assert_close(parameters(tmp_path / "moved"), parameters(tmp_path / "whole"))
    assert logged_steps(tmp_path / "moved") == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_so_and_exits_with_0(tmp_path: Path, data_dir: Path, number: signal.Signals) -> None:
    process = start("vae-tiny", tmp_path / "run", data_dir, "--steps", "100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output = finish(process)
    last = logged_steps(tmp_path / "run")[-1]
    assert f"step {last} of 100000 is saved" in output
    assert load(tmp_path / "run", step=last).step == last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path: Path, data_dir: Path, number: signal.Signals) -> None:
    processes = start_pair("vae-tiny", tmp_path / "run", data_dir, "--steps", "100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].send_signal(number)
    output = finish(*processes)
    last = logged_steps(tmp_path / "run")[-1]
    assert f"step {last} of 100000 is saved" in output
    assert load(tmp_path / "run", step=last).step == last


def test_a_second_process_is_refused(tmp_path: Path, data_dir: Path) -> None:
    first = start("vae-tiny", tmp_path / "run", data_dir, "--steps", "100000")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    output = finish(start("vae-tiny", tmp_path / "run", data_dir, "--steps", "100000"), status=2)
    assert f"another process is writing to {tmp_path / 'run'}" in output
    assert first.poll() is None
    first.kill()
    first.communicate()
