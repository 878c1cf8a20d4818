"""The command line as a stranger meets it: help, suggestions, one line for what the user did wrong."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tokenizers

from experiments import clip, run
from experiments.presets import from_command_line, presets
from tools.evaluate import evaluate
from tools.likelihood import likelihood
from tools.sample import sample
from vlm_jax.commandline import gathered
from vlm_jax.data import open_source
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import vdm
from vlm_jax.sharding import MeshShape, make_mesh
from vlm_jax.workdir import read_record

ROOT = Path(__file__).parents[1]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    run.main()


def test_an_unknown_preset_is_answered_with_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no preset 'clip-tny': did you mean clip-tiny"):
        call(monkeypatch, "clip-tny")
    with pytest.raises(UserError, match="there is no preset 'zzz': --help lists all"):
        call(monkeypatch, "zzz")


def test_an_unknown_field_is_answered_with_the_right_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, "clip-tiny", "--optimizer.learning-rat", "1")
    assert refused.value.code == 2
    told = "".join(capsys.readouterr())
    assert told.count("--optimizer.learning-rate ") == 1
    assert "autoregressive" not in told, "the help of other presets"


def test_a_value_of_the_wrong_type_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, "clip-tiny", "--steps", "many")
    assert refused.value.code == 2
    assert "--steps" in "".join(capsys.readouterr())


def test_help_lists_every_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--help")
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in presets())


def test_a_command_without_a_preset_says_what_its_first_word_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ((), ("--steps", "3")):
        with pytest.raises(UserError, match=r"the first word after python -m experiments\.run is a preset's name"):
            call(monkeypatch, *arguments)


def test_a_preset_is_built_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Experiment:
        raise AssertionError("nobody asked for this one")

    monkeypatch.setattr(clip, "PRESETS", (broken, *clip.PRESETS))
    monkeypatch.setattr(sys, "argv", ["run", "clip-tiny", "--steps", "7"])
    name, experiment = from_command_line("run", "Trains.", lambda preset: preset)
    assert name == "clip-tiny"
    assert experiment.training == replace(clip.clip_tiny().training, steps=7)


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As in `--help | head -1`."""
    shell = f"{sys.executable} -m experiments.run --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout.strip() in ("0", "1"), done.stderr) == (True, "")


@pytest.mark.parametrize("package", ["experiments", "tools"])
def test_ctrl_c_while_a_command_imports_ends_it_without_a_traceback(package: str) -> None:
    code = f"import os, signal, sys; sys.argv = ['-m']; import {package}; os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    ("argument", "status", "printed"),
    [
        ("plain", 0, "\\xb1 done\n"),
        ("ü", 2, r"error: the argument '\udcc3\udcbc' is not text in the encoding ascii of this terminal: set LC_ALL="),
    ],
)
def test_a_terminal_that_knows_ascii_alone(argument: str, status: int, printed: str) -> None:
    """What it cannot show is escaped, and what it cannot pass on is refused before anything is done."""
    code = "from vlm_jax.commandline import command\nwith command(): print('\\xb1 done')"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == status, done.stderr
    assert (done.stdout if status == 0 else done.stderr).startswith(printed)


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path) -> None:
    """So that the corrected command is not told that the directory belongs to another configuration."""
    preset = presets()["vae-tiny"][1]
    training = replace(preset.training, batch_size=12)
    with pytest.raises(UserError, match="batch size 12 cannot be split"):
        run.run("vae-tiny", replace(preset, training=training, workdir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_devices_cannot_split_is_refused_before_any_file_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    preset = presets()["ladder-vae-cifar10"][1]
    monkeypatch.setattr(run, "make_mesh", lambda _: make_mesh(MeshShape(), 8 * jax.devices()))
    with pytest.raises(UserError, match=r"batch size 32 cannot be split over 64 devices .* such as --batch-size 64$"):
        run.run("ladder-vae-cifar10", replace(preset, workdir=str(tmp_path / "run"), data_dir=str(tmp_path / "data")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [evaluate, sample, likelihood])
@pytest.mark.parametrize("told_by", ["jax", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_commands_that_run_in_one_process_refuse_several(
    command: Callable, told_by: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything else: the directory is not even that of a run."""
    if told_by == "jax":
        monkeypatch.setattr(jax, "process_count", lambda: 16)
    else:
        monkeypatch.setenv(told_by, "16")
    with pytest.raises(UserError, match="was started in 16 processes and runs in one: start it once, on a machine of"):
        command(workdir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_processes_that_cannot_find_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"need distributed\.coordinator, without which each process would train alone"):
        call(monkeypatch, "vae-tiny", "--distributed.num-processes", "2")
    # In a process of its own, as none can be connected that has computed before.
    command = [sys.executable, "-m", "experiments.run", "vae-tiny", "--distributed.coordinator", "localhost:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "error: the processes of the run cannot find each other" in done.stderr
    assert done.stderr.endswith("--distributed.num-processes and --distributed.process-id\n")


@pytest.mark.parametrize("module", ["tools.evaluate", "tools.sample"])
def test_errors_are_one_line_and_status_2(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} is not the directory of a run: it has no config.json\n"


@pytest.mark.slow
def test_a_validation_split_smaller_than_the_batch_and_the_mesh_is_used(tmp_path: Path, data_dir: Path) -> None:
    preset = presets()["vae-tiny"][1]
    model = replace(preset.model, latent=2, widths=(8,), mixtures=1)
    data = replace(preset.data, validation="validation[:7]")
    training = replace(preset.training, steps=1, batch_size=32)
    where = {"workdir": str(tmp_path / "run"), "data_dir": str(data_dir)}
    run.run("vae-tiny", replace(preset, model=model, data=data, training=training, **where))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert math.isfinite(line["validation_loss"])


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_before_a_step(tmp_path: Path, data_dir: Path) -> None:
    """Though no id of the data's captions may be outside the model's vocabulary."""
    preset = presets()["clip-tiny"][1]
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 2048}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = replace(preset.data, text=replace(preset.data.text, tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(UserError, match=r"ids up to 2048 and the model's vocab_size is 2048: .* at least 2049"):
        run.run("clip-tiny", replace(preset, data=data, workdir=str(tmp_path / "run"), data_dir=str(data_dir)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_newer_version_of_its_data_is_another_run(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is prepared beside it; the version that the run began with is found by its name."""
    mine = tmp_path / "data" / "mine"
    shutil.copytree(open_source("digits", "train", data_dir).directory, mine / "1.0.9")

    def train(name: str) -> None:
        preset = presets()["vae-tiny"][1]
        data = replace(preset.data, name=name)
        settings = {"workdir": str(tmp_path / "run"), "data_dir": str(tmp_path / "data")}
        run.run("vae-tiny", replace(preset, data=data, **settings))

    trained = []
    checkpoint = tmp_path / "run" / "checkpoints" / "1"
    monkeypatch.setattr(run, "fit", lambda *_, **__: [trained.append(1), checkpoint.mkdir(parents=True, exist_ok=True)])
    train("mine")
    record = read_record(tmp_path / "run")
    assert record["data"]["name"] == "mine:1.0.9"
    assert record["examples"] == {"train": 1257, "validation": 180, "test": 360}
    train("mine")
    shutil.copytree(mine / "1.0.9", mine / "1.0.10")
    with pytest.raises(UserError, match=r'belongs to another .*\(data\.name: "mine:1\.0\.9" -> "mine:1\.0\.10"\)'):
        train("mine")
    train("mine:1.0.9")
    description = mine / "1.0.9" / "dataset_info.json"
    description.write_text(description.read_text().replace('"1257"', '"1256"'))
    with pytest.raises(UserError, match=r"belongs to another .*\(examples\.train: 1257 -> 1256\)"):
        train("mine:1.0.9")
    assert len(trained) == 3


def test_settings_of_sampling_of_another_family_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    experiment = replace(presets()["vae-tiny"][1], sampling=vdm.Sampling(), workdir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"are vlm_jax\.models\.vdm\.Sampling and the model has none"):
        run.run("vae-tiny", experiment)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--prompt", "a", "--prompt", "b c"], ["--prompt", "a", "b c"]),
        (["--prompt", "a", "b", "--seed", "1", "--prompt", "c"], ["--prompt", "a", "b", "c", "--seed", "1"]),
        (
            ["--image", "x", "--prompt", "a", "--image", "y", "--prompt", "b", "--num", "2"],
            ["--image", "x", "y", "--prompt", "a", "b", "--num", "2"],
        ),
        (["--num", "2", "--num", "3"], ["--num", "2", "--num", "3"]),
        ([], []),
    ],
)
def test_a_flag_may_be_repeated_for_each_of_its_values(given: list[str], meant: list[str]) -> None:
    assert gathered(given, "--prompt", "--image") == meant
