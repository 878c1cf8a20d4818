"""The tools on small runs: what they measure, write and refuse."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from experiments.presets import presets
from experiments.run import run
from tools.evaluate import evaluate, labelled, print_table
from tools.sample import Options, main, sample, told
from vlm_jax.contract import Input
from vlm_jax.data import open_source
from vlm_jax.errors import UserError
from vlm_jax.evals import Evaluation, Labelled
from vlm_jax.models import diffusion, vdm
from vlm_jax.nn.unet import UNet


def bits_per_dim(workdir: Path, draws: int) -> np.ndarray:
    """[draws, 360] for the digits of the test split, by the model that is loaded."""
    run = vlm_jax.load(workdir)
    source = open_source(run.experiment.data.name, "test", Path(run.experiment.data_dir))
    image = np.stack([record["image"].pixels(1) for record in (source[i] for i in range(len(source)))])
    nats = jax.jit(lambda key: run.model.log_likelihood(run.variables, {"image": image}, key))
    return np.stack([-nats(jax.random.key(seed)) for seed in range(draws)]) / (64 * np.log(2))


@pytest.fixture(scope="module")
def measured(vae_run: Path) -> dict[str, Any]:
    """All that can be measured of it, as it is written."""
    results = evaluate(vae_run)
    assert results == json.loads((vae_run / "eval.json").read_text())
    return results


def test_a_vae_is_measured_by_what_it_can_do(vae_run: Path, measured: Any, capsys: pytest.CaptureFixture) -> None:
    assert (measured["split"], measured["examples"], measured["bound"]) == ("test", 360, "lower")
    assert {name.split("/")[0] for name in measured} == {
        "step", "split", "examples", "seed", "bound", "likelihood", "importance_weighted", "reconstruction",
        "information",
    }  # fmt: skip
    bits = bits_per_dim(vae_run, draws=8)
    np.testing.assert_allclose(measured["likelihood/bits_per_dim"], bits.mean(), rtol=2e-3)
    error = bits.mean(axis=0).std(ddof=1) / np.sqrt(360)
    np.testing.assert_allclose(measured["likelihood/bits_per_dim_standard_error"], error, rtol=0.05)
    assert measured["importance_weighted/bits_per_dim"] < measured["likelihood/bits_per_dim"]
    print_table(measured)
    assert "likelihood/bits_per_dim " in capsys.readouterr().out


def test_what_latents_tell_is_learned_from_the_training_split_without_what_is_measured(
    vae_run: Path, measured: Any
) -> None:
    assert (measured["information/images"], measured["information/training_images"]) == (360, 1257)
    assert measured["information/label_accuracy_chance"] < 0.2 < 0.9 < measured["information/label_accuracy_of_pixels"]
    assert measured["information/label_nats_lost_by_latents"] > 0  # of four numbers, hardly trained
    assert not any("word" in name or "caption" in name for name in measured)
    own = evaluate(vae_run, only=("information",), split="train[:40]")
    assert (own["information/images"], own["information/training_images"]) == (40, 1217)


def test_evaluation_is_the_same_whatever_the_batch_size_and_reads_without_writing(vae_run: Path) -> None:
    """The last batch is padded, and the padding must not count. Noise is drawn per batch, so only what has none."""
    before = {path: path.stat().st_mtime_ns for path in (vae_run / "checkpoints").rglob("*")}
    first, second = (evaluate(vae_run, batch_size=size, only=("reconstruction",)) for size in (360, 250))
    for name in ("reconstruction/psnr", "reconstruction/ssim"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)
    assert before == {path: path.stat().st_mtime_ns for path in (vae_run / "checkpoints").rglob("*")}


def test_some_evaluations_alone_can_be_asked_for_and_join_those_of_the_same_images(
    vae_run: Path, tmp_path: Path
) -> None:
    workdir = shutil.copytree(vae_run, tmp_path / "run")
    (workdir / "eval.json").write_text("damaged")

    def ask(name: str, **options: Any) -> set[str]:
        asked = evaluate(workdir, only=(name,), **options)
        assert {metric.split("/")[0] for metric in asked if "/" in metric} == {name}
        kept = json.loads((workdir / "eval.json").read_text())
        assert asked.items() <= kept.items()
        return {metric.split("/")[0] for metric in kept if "/" in metric}

    assert ask("reconstruction") == {"reconstruction"}
    assert ask("likelihood") == {"reconstruction", "likelihood"}
    assert ask("reconstruction", split="test[:50]") == {"reconstruction"}
    assert ask("likelihood", split="test[:50]", seed=1) == {"likelihood"}


def test_clip_is_measured_by_retrieval_and_zero_shot(clip_run: Path) -> None:
    results = evaluate(clip_run)
    assert results["examples"] == 400
    for direction in ("text_to_image", "image_to_text"):
        recalls = [results[f"retrieval/{direction}_recall@{k}"] for k in (1, 5, 10)]
        assert 0 <= recalls[0] <= recalls[1] <= recalls[2] <= 0.5
    assert results["zero_shot/chance"] == 1 / 8
    assert results["zero_shot/examples"] > 900
    assert "likelihood/bits_per_dim" not in results


def test_another_split_checkpoint_and_task_can_be_asked_for(clip_run: Path) -> None:
    options = {"split": "train[:50]", "checkpoint_step": 2, "prompts": ("a {}", "{} shape")}
    results = evaluate(clip_run, zero_shot="easy_vqa/shape", zero_shot_split="test[:70]", **options)
    assert (results["step"], results["split"], results["examples"]) == (2, "train[:50]", 50)
    assert (results["zero_shot/chance"], results["zero_shot/examples"]) == (pytest.approx(1 / 3), 70)


def test_results_say_what_was_classified_and_how(clip_run: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("round\nboxy\npointed\n")
    asked: dict[str, Any] = {"zero_shot": "easy_vqa/shape", "zero_shot_split": "test[:70]", "prompts": ("a {}", "{}")}
    asked |= {"zero_shot_names": str(tmp_path / "names.txt"), "only": ("zero_shot",)}
    evaluate(clip_run, **asked, out=tmp_path / "eval.json")
    kept = json.loads((tmp_path / "eval.json").read_text())
    facts = {name: value for name, value in kept.items() if name.startswith("zero_shot_")}
    assert facts == {
        "zero_shot_data": "easy_vqa/shape",
        "zero_shot_split": "test[:70]",
        "zero_shot_names": str(tmp_path / "names.txt"),
        "zero_shot_prompts": "a {} | {}",
    }


def test_prompts_replace_those_of_the_runs_own_task(clip_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def looked(*told: Any) -> Labelled:
        seen.append(labelled(*told))
        return seen[-1]

    monkeypatch.setattr("tools.evaluate.labelled", looked)
    evaluate(clip_run, only=("zero_shot",), prompts=("one {}",))
    assert seen[0].prompts == ("one {}",) and len(seen[0].label_names) == 8


def test_what_the_run_names_to_classify_may_be_missing(
    clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Such as ImageNet, which the published presets name: all else is measured, kept, and the lack is told."""
    workdir = shutil.copytree(clip_run, tmp_path / "run")
    record = json.loads((workdir / "config.json").read_text())
    record["zero_shot"]["name"] = "imagenet2012"
    (workdir / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"zero_shot: .*imagenet2012.* \(what is printed above holds\)"):
        evaluate(workdir)
    told = capsys.readouterr()
    assert told.err.count("zero_shot failed: ") == 1
    assert "retrieval/text_to_image_recall@1" in told.out
    assert "retrieval/text_to_image_recall@1" in json.loads((workdir / "eval.json").read_text())
    for options in ({"only": ("zero_shot",)}, {"zero_shot": "imagenet2012"}):
        with pytest.raises(UserError, match=r"^(?!zero_shot: ).*imagenet2012"):
            evaluate(workdir, **options)
    assert capsys.readouterr().out == ""


def evaluation(name: str, result: Callable[[], dict]) -> Evaluation:
    return Evaluation(name, ("encode",), lambda subject: result())


def fail() -> dict:
    raise ValueError("of\n4x4 pixels")


def test_an_evaluation_that_fails_is_told_and_does_not_take_the_others_with_it(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "eval.json"
    before: list[str] = []

    def look() -> dict[str, float]:
        before.append(out.read_text())  # what came before is written already
        return {"z": 2.0}

    each = [("one", lambda: {"x": 1.0}), ("two", fail), ("three", look)]
    monkeypatch.setattr("tools.evaluate.EVALUATIONS", [evaluation(name, result) for name, result in each])
    with pytest.raises(UserError, match=r"^two: ValueError: of 4x4 pixels \(what is printed above holds\)$"):
        evaluate(vae_run, out=out)
    kept = json.loads(out.read_text())
    assert kept["one/x"] == 1 and kept["three/z"] == 2 and not any("two" in name for name in kept)
    assert json.loads(before[0])["one/x"] == 1
    told = capsys.readouterr()
    assert "two failed: ValueError: of 4x4 pixels\n" in told.err
    assert "one/x  1.0000\n" in told.out and "three/z  2.0000\n" in told.out


def test_what_is_not_finite_is_null_in_the_file(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    odd = evaluation("odd", lambda: {"nan": math.nan, "inf": math.inf, "none": None, "one": 1.0})
    monkeypatch.setattr("tools.evaluate.EVALUATIONS", [odd])
    results = evaluate(vae_run, out=tmp_path / "eval.json")
    text = (tmp_path / "eval.json").read_text()
    assert json.loads(text) == results and "NaN" not in text and "Infinity" not in text
    assert [results[f"odd/{name}"] for name in ("nan", "inf", "none", "one")] == [None, None, None, 1]
    out = capsys.readouterr().out
    assert "odd/inf   inf\n" in out and "odd/none  undefined\n" in out


@pytest.mark.parametrize(
    ("tool", "options", "written"),
    [(evaluate, {"only": ("reconstruction",)}, "eval.json"), (sample, {}, "samples.png")],
)
def test_a_tilde_that_the_shell_left_is_the_home_directory_in_what_is_written_too(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Callable, options: dict, written: str
) -> None:
    monkeypatch.setattr("tools.sample.samples", lambda loaded, options, source: [("drawn", [])])
    shutil.copytree(vae_run, tmp_path / "home" / "run", ignore=shutil.ignore_patterns(written))
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    tool(Path("~/run"), **options)
    assert (tmp_path / "home" / "run" / written).exists()
    assert not list((tmp_path / "here").iterdir())


def test_results_are_printed_though_they_cannot_be_written(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As in the directory of another person's run."""

    def refuse(path: Path, write: Callable) -> None:
        raise UserError(f"{path} cannot be written (Read-only file system): choose another place for it")

    monkeypatch.setattr("tools.evaluate.EVALUATIONS", [evaluation("one", lambda: {"x": 1.0})])
    monkeypatch.setattr("tools.evaluate.write_output", refuse)
    with pytest.raises(
        UserError, match=r"eval\.json cannot be written \(Read-only file system\).* printed above holds"
    ):
        evaluate(vae_run)
    assert "one/x  1.0000\n" in capsys.readouterr().out


def test_damage_in_the_newest_checkpoint_is_told_and_the_one_before_is_used(
    clip_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = shutil.copytree(clip_run, tmp_path / "run")
    victim = max((workdir / "checkpoints" / "3" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert evaluate(workdir)["step"] == 2
    assert "checkpoint 3 is damaged" in caplog.text
    assert (workdir / "checkpoints" / "3").exists()  # a reader moves nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "tset"),
        ({"checkpoint_step": 77}, "there is no checkpoint 77"),
        ({"zero_shot": "openmoji"}, "openmoji has no labels to classify"),
        ({"zero_shot": "esy_vqa/color"}, "easy_vqa/color"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"seed": 2**70}, "the seed is 1180591620717411303424"),
        ({"out": Path("/dev/null/eval.json")}, r"/dev/null/eval\.json cannot be written"),
        ({"out": Path("/dev")}, "/dev is a directory"),
        ({"out": Path("gs://bucket/eval.json")}, "gs:/bucket/eval.json is not a directory or file of this machine"),
        ({"zero_shot_names": "absent"}, r"names of the classes in absent cannot be read \(No such file or directory\)"),
        ({"zero_shot_label": "colour"}, "easy_vqa/color has no label 'colour': choose among label"),
        ({"only": ("likelihod",)}, "no evaluation likelihod: choose from retrieval, zero_shot, .* for --only"),
        ({"only": ("likelihood",)}, "nothing for the evaluation likelihood to measure"),
    ],
)
def test_refusals_name_the_offender(clip_run: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(clip_run, **options)


@pytest.mark.parametrize("options", [{"zero_shot": "easy_vqa/color"}, {"prompts": ("a {}",)}])
def test_a_model_without_texts_classifies_nothing(vae_run: Path, options: dict) -> None:
    with pytest.raises(UserError, match="takes no texts: leave out --zero-shot and --prompts"):
        evaluate(vae_run, **options)


def test_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not the directory of a run"):
            evaluate(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_sheets_are_pictures_that_depend_on_the_seed(vae_run: Path, tmp_path: Path) -> None:
    paths = [sample(vae_run, Options(num=3, seed=seed, out=tmp_path / f"{i}.png")) for i, seed in enumerate((0, 0, 1))]
    sheets = [pixels(path) for path in paths]
    np.testing.assert_array_equal(sheets[0], sheets[1])
    assert (sheets[0] != sheets[2]).any()


@pytest.fixture(scope="module")
def told_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of two steps of a small diffusion model of digits, so large that it heeds the class it is told."""
    workdir = tmp_path_factory.mktemp("told") / "run"
    preset = presets()["diffusion-tiny-ddpm"][1]
    network = replace(preset.model.network, backbone=UNet(widths=(8,), blocks=1, groups=4))
    small = replace(preset, model=replace(preset.model, network=network), sampling=diffusion.Sampling(steps=3))
    optimizer = replace(preset.training.optimizer, learning_rate=0.1, warmup_steps=0, schedule="constant")
    training = replace(preset.training, optimizer=optimizer, ema_decay=None, steps=2, batch_size=16)
    run("diffusion-tiny-ddpm", replace(small, workdir=str(workdir), data_dir=str(data_dir), training=training))
    return workdir


def asked(workdir: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> np.ndarray:
    """The sheet that the command writes."""
    out = workdir.parent / "asked.png"
    monkeypatch.setattr(sys, "argv", ["sample", str(workdir), *flags, "--out", str(out), "--num", "4"])
    main()
    return pixels(out)


@pytest.mark.slow
def test_settings_of_sampling_are_asked_for_by_the_command_and_change_no_run(
    told_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = vlm_jax.load(told_run).experiment.sampling
    assert settings == diffusion.Sampling(steps=3)
    plain = asked(told_run, monkeypatch)
    sheets = [asked(told_run, monkeypatch, "--sampling.guidance", guidance) for guidance in ("0", "1", "3")]
    np.testing.assert_array_equal(sheets[1], plain)
    assert (sheets[0] != plain).any() and (sheets[2] != plain).any()
    assert (asked(told_run, monkeypatch, "--sampling.solver", "ddim") != plain).any()
    # The run is the same one with other settings, and goes on.
    experiment = vlm_jax.load(told_run).experiment
    longer = replace(experiment.training, steps=3)
    run("diffusion-tiny-ddpm", replace(experiment, sampling=diffusion.Sampling(steps=2), training=longer))
    loaded = vlm_jax.load(told_run, step=3)
    assert (loaded.step, loaded.experiment.sampling) == (3, diffusion.Sampling(steps=2))


def test_classes_and_texts_are_told_in_turn_by_number_or_name() -> None:
    source: Any = SimpleNamespace(label_names=("no", "one"), name="these data")
    tokenizer = SimpleNamespace(encode_prompts=lambda texts, length: np.array([[len(text)] * length for text in texts]))
    loaded: Any = SimpleNamespace(
        tokenizer=tokenizer, model=SimpleNamespace(conditions={"tokens": Input((2,), "int32", 9)})
    )
    titles, given = told(loaded, Options(num=5, label=("3", "one")), lambda: source)
    assert titles == ["3", "one", "3", "one", "3"]
    np.testing.assert_array_equal(given["label"], [3, 1, 3, 1, 3])
    titles, given = told(loaded, Options(num=3, prompt=("a", "dog")), lambda: source)
    assert titles == ["a", "dog", "a"] and given.keys() == {"tokens"}
    np.testing.assert_array_equal(given["tokens"], [[1, 1], [3, 3], [1, 1]])
    assert told(loaded, Options(num=2), lambda: source) == (["0", "1"], {})
    with pytest.raises(UserError, match="--label two is none of the classes of these data: choose no, one"):
        told(loaded, Options(label=("two",)), lambda: source)


@pytest.mark.slow
def test_what_a_model_of_classes_cannot_be_told_is_refused(told_run: Path) -> None:
    with pytest.raises(UserError, match=r"takes no --prompt: leave it out \(it can be told --label\)"):
        sample(told_run, Options(prompt=("a three",)))
    with pytest.raises(UserError, match=r"'label' holds the value 10, outside \[0, 10\)"):
        sample(told_run, Options(label=("10",)))
    with pytest.raises(UserError, match=r"are vlm_jax\.models\.vdm\.Sampling and the model has .*diffusion\.Sampling"):
        sample(told_run, Options(sampling=vdm.Sampling()))


@pytest.mark.slow
def test_help_lists_the_runs_own_settings_of_sampling_or_says_how(
    told_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for words in ([str(told_run), "--help"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["sample", *words])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0
        text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
        assert "--temperature" in text
        assert ("--sampling.guidance" in text) == (len(words) == 2)
        assert ("WORKDIR --help lists the run's own settings" in text) == (len(words) == 1)
    monkeypatch.setattr(sys, "argv", ["sample", "--num", "3"])
    with pytest.raises(UserError, match=r"first word after python -m tools\.sample is the directory of a run"):
        main()


def test_captions_or_prompts_find_images(clip_run: Path, tmp_path: Path) -> None:
    by_caption = sample(clip_run, Options(num=2, out=tmp_path / "captions.png"))
    by_prompt = sample(clip_run, Options(prompt=("red circle",), out=tmp_path / "prompt.png"))
    assert len(pixels(by_caption)) > len(pixels(by_prompt))


def test_sheets_of_fewer_images_than_asked_for(vae_run: Path, clip_run: Path, tmp_path: Path) -> None:
    for index, workdir in enumerate((vae_run, clip_run)):
        assert sample(workdir, Options(num=4, split="test[:3]", out=tmp_path / f"{index}.png")).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ("red circle",)}, r"takes no --prompt: leave it out \(it can be told nothing\)"),
        ({"label": ("3",)}, r"takes no --label: leave it out \(it can be told nothing\)"),
        ({"sampling": vdm.Sampling()}, r"are vlm_jax\.models\.vdm\.Sampling and the model has none: give it its own"),
        ({"num": 0}, "--num is 0"),
        ({"out": Path("sheet")}, r"--out is sheet: it must end in \.png"),
        ({"out": Path("s3://bucket/a.png")}, "s3:/bucket/a.png is not a directory or file of this machine"),
        ({"temperature": float("nan")}, "--temperature is nan: it must be a number, at least 0"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"seed": 2**70}, r"seed is 1180591620717411303424: it must lie in \[0, 2\^32\)"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_sampling_refusals(vae_run: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(vae_run, Options(**options))


def test_a_sheet_is_refused_before_it_is_drawn_where_it_cannot_be(vae_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tools.sample.samples", None)
    (tmp_path / "directory.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"directory\.png is a directory"):
        sample(vae_run, Options(out=tmp_path / "directory.png"))
    with pytest.raises(UserError, match=r"sheet\.png cannot be written \((Not a directory|File exists)\)"):
        sample(vae_run, Options(out=tmp_path / "file" / "sheet.png"))


@pytest.mark.parametrize("tool", [evaluate, sample])
def test_a_run_that_lost_its_tokenizer_is_told_so(clip_run: Path, tmp_path: Path, tool: Callable) -> None:
    workdir = shutil.copytree(clip_run, tmp_path / "run")
    (workdir / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"run has lost its tokenizer\.json.*: copy it back"):
        tool(workdir)
