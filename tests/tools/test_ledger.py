"""The ledger: what stands in it agrees with what the evaluation says, and the baselines with their definitions."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.presets import presets
from tools.evaluate import evaluate
from tools.likelihood import categorical, choose, gaussian, likelihood
from vlm_jax.errors import UserError


@pytest.mark.slow
def test_a_finished_run_is_measured_as_it_is_beside_the_baselines(
    vae_run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The run has other settings than its preset and was trained for four steps: it is not trained anew."""
    shutil.copytree(vae_run, tmp_path / "vae-tiny")
    before = sorted((tmp_path / "vae-tiny").rglob("*"))
    rows = likelihood(presets=("vae-tiny",), workdir=tmp_path, data_dir=str(data_dir))
    results = evaluate(vae_run)
    (row,) = (row for row in rows if row.family == "vae")
    assert row.bits_per_dim == pytest.approx(results["likelihood/bits_per_dim"], rel=1e-6)
    assert row.standard_error == pytest.approx(results["likelihood/bits_per_dim_standard_error"], rel=1e-4)
    assert (row.variant, row.bound, row.given, row.dequantisation) == ("vae-tiny", "lower bound", "", "none")
    assert row.parameters is not None and row.parameters < 1e5
    assert row.training_flops is not None and 1e8 < row.training_flops < 1e11
    assert row.evaluate_seconds is not None and row.sample_seconds is not None
    assert [row.bits_per_dim for row in rows] == sorted((row.bits_per_dim for row in rows), reverse=True)
    out = tmp_path / "likelihood-digits"
    assert [entry["variant"] for entry in json.loads((out / "ledger.json").read_text())] == [r.variant for r in rows]
    assert (out / "ledger.md").read_text() in capsys.readouterr().out
    assert json.loads((out / "vae-tiny.json").read_text())["likelihood/bits_per_dim"] == row.bits_per_dim
    assert sorted((tmp_path / "vae-tiny").rglob("*")) == before  # a run is read, and may lie where nothing is written
    assert (out / "ledger.png").stat().st_size > 10_000
    uniform = next(row for row in rows if row.variant == "uniform")
    assert uniform.bits_per_dim == pytest.approx(math.log2(17))


@pytest.mark.slow
def test_what_is_missing_is_trained_and_what_is_complete_is_not_touched(
    vae_run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete run need not even find the devices that it was trained on."""
    shutil.copytree(vae_run, tmp_path / "vae-tiny")
    record = json.loads((vae_run / "config.json").read_text())
    record["training"]["mesh"] = {"data": 1, "fsdp": 512, "tensor": 1}
    (tmp_path / "vae-tiny" / "config.json").write_text(json.dumps(record))
    pixels = presets()["autoregressive-tiny"][1]
    transformer = replace(pixels.model.transformer, width=8, depth=1, heads=1, mlp=8)
    training = replace(pixels.training, steps=2, batch_size=16)
    small = replace(pixels, model=replace(pixels.model, classes=10, transformer=transformer), training=training)
    known = presets() | {"autoregressive-tiny": ("", small)}
    monkeypatch.setattr("tools.likelihood.presets", lambda: known)
    rows = likelihood(presets=("vae-tiny", "autoregressive-tiny"), workdir=tmp_path, data_dir=str(data_dir))
    assert {row.variant: row.given for row in rows if row.family != "baseline"} == {
        "vae-tiny": "",
        "autoregressive-tiny": "class",
    }
    assert (tmp_path / "autoregressive-tiny" / "checkpoints" / "2").exists()
    assert json.loads((tmp_path / "vae-tiny" / "config.json").read_text()) == record


def test_a_preset_that_fails_does_not_take_the_others_with_it(
    vae_run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(vae_run, tmp_path / "vae-tiny")

    def train(name: str, experiment: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr("tools.likelihood.run", train)
    monkeypatch.setattr("tools.likelihood.TIMED", 2)
    with pytest.raises(UserError, match=r"^kde-tiny: MemoryError: too large$"):
        likelihood(presets=("kde-tiny", "vae-tiny"), workdir=tmp_path, data_dir=str(data_dir))
    ledger = json.loads((tmp_path / "likelihood-digits" / "ledger.json").read_text())
    assert "vae-tiny" in {entry["variant"] for entry in ledger} and (tmp_path / "likelihood-digits/ledger.png").exists()
    assert "kde-tiny failed: MemoryError: too large\n" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"test": "validation"}, {"name": "digits:1.0.1"}, {"image_size": 16}])
def test_a_run_of_other_images_is_refused(vae_run: Path, tmp_path: Path, change: dict) -> None:
    workdir = shutil.copytree(vae_run, tmp_path / "vae-tiny")
    record = json.loads((workdir / "config.json").read_text())
    record["model" if "image_size" in change else "data"] |= change
    (workdir / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"vae-tiny is measured on .* and kde-tiny on digits:1.0.0, split test, shape"):
        likelihood(presets=("kde-tiny", "vae-tiny"), workdir=tmp_path)
    assert not (tmp_path / "kde-tiny").exists()


def test_independent_categorical_pixels_are_counted_with_half_a_count_for_each_level() -> None:
    train = np.array([[0, 1], [0, 2], [0, 1]])
    nats = categorical(train, np.array([[0, 1], [2, 0]]), 3)
    np.testing.assert_allclose(np.exp(nats), [3.5 / 4.5 * 2.5 / 4.5, 0.5 / 4.5 * 0.5 / 4.5])


def test_the_gaussian_reaches_the_entropy_of_gaussian_levels() -> None:
    """Of levels so many that rounding loses nothing, correlated, their determinant known."""
    rng = np.random.default_rng(0)
    root = np.array([[30.0, 0.0], [40.0, 20.0]])
    train, test = (np.round(rng.normal(size=(n, 2)) @ root.T).astype(int) for n in (20_000, 20_000))
    entropy = math.log(2 * math.pi * math.e) + math.log(30 * 20)
    assert gaussian(train, test).mean() == pytest.approx(-entropy, abs=0.02)


def test_every_preset_on_the_data_that_has_a_likelihood_is_chosen() -> None:
    chosen = choose((), "digits")
    tiny = {name for name, (_, experiment) in presets().items() if experiment.data.name == "digits"}
    assert chosen.keys() == tiny
    assert {"kde-tiny", "flow-tiny", "diffusion-tiny", "autoregressive-tiny", "vae-tiny"} <= chosen.keys()
    assert choose((), "openmoji").keys() == {
        "autoencoder-tiny",
        "autoregressive-tiny-openmoji",
        "diffusion-tiny-patches",
        "vae-tiny-openmoji",
        "vqvae-tiny",
    }  # neither clip nor texts


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (("vae-tny",), "digits", "vae-tiny"),
        (("vae-tiny-openmoji",), "digits", "vae-tiny-openmoji trains on openmoji, not on digits"),
        (("language-tiny",), "openmoji", "language-tiny has no likelihood of images"),
        (("clip-tiny",), "openmoji", "clip-tiny has no likelihood of images"),
        ((), "easy_vqa", "no preset that has a likelihood trains on easy_vqa"),
    ],
)
def test_presets_that_cannot_be_compared_are_refused(names: tuple[str, ...], data: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(names, data)
