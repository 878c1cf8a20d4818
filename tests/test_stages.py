"""What frozen parts make of images, made once: the same steps as where it is made each time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import run
from experiments.data import DIGITS, TINY
from smallest import DIT, PYRAMID
from vlm_jax.data import Image
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder, build, latent_diffusion, probability_flow, vae
from vlm_jax.stages import STAGES, staged
from vlm_jax.start import Start

FIRST = autoencoder.Config(image_size=8, channels=1, levels=17, network=replace(PYRAMID, dropout=0.0), latent=2)
OPTIMIZER = replace(TINY.optimizer, schedule="constant")
TRAINING = replace(TINY, optimizer=OPTIMIZER, steps=3, batch_size=16, log_every=1, checkpoint_every=3)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A latent diffusion that begins with a first stage of three steps."""
    directory = tmp_path_factory.mktemp("stages")
    run.run("first", Experiment(model=FIRST, data=DIGITS, training=TRAINING, workdir=str(directory / "first")))
    network = replace(DIT, classes=10)
    prior = probability_flow.Config(image_size=4, channels=2, levels=None, network=network, likelihood_steps=2)
    return Experiment(
        model=latent_diffusion.Config(first=FIRST, prior=prior),
        data=DIGITS,
        training=replace(TRAINING, seed=1),
        start=(Start(workdir=str(directory / "first"), into="first"),),
        frozen=("^first/",),
        workdir=str(directory / "second"),
    )


def losses(workdir: Path) -> list[tuple[float, float | None]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line.get("validation_loss")) for line in lines]


@pytest.mark.slow
def test_the_steps_of_a_run_are_those_of_one_whose_stages_are_cached(
    second: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Loss, validation and all; a second run of the same first stage finds the file, and goes on with or without it."""
    data = replace(second.data, validation="test")
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    for each in Path(second.data_dir).expanduser().glob("*"):  # the data that is there, without others' stages
        if each.name != STAGES:
            (data_dir / each.name).symlink_to(each)
    plain = replace(second, data=data, workdir=str(tmp_path / "plain"))
    cached = replace(plain, cached=True, data_dir=str(data_dir), workdir=str(tmp_path / "cached"))
    run.run("second", plain)
    run.run("second", cached)
    np.testing.assert_allclose(
        np.array(losses(tmp_path / "cached"), float), np.array(losses(tmp_path / "plain"), float), rtol=1e-5
    )
    assert capfd.readouterr().out.count("encoding ") == 2
    files = sorted((data_dir / STAGES).iterdir())
    assert [np.load(file).shape[1:] for file in files] == [(4, 4, 4)] * 2
    longer = replace(cached, training=replace(cached.training, steps=4))
    run.run("second", longer)
    run.run("second", replace(longer, cached=False, training=replace(cached.training, steps=5)))
    assert "encoding " not in capfd.readouterr().out
    assert sorted((data_dir / STAGES).iterdir()) == files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frozen": ("^prior/backbone/patch/",)}, "cached stages are made by parts that do not train: freeze all that"),
        ({"fields": (Image(flip=True),)}, "cached stages are of each image as it is: set flip to False"),
    ],
)
def test_images_that_would_be_encoded_otherwise_next_time_are_refused(
    second: Experiment, tmp_path: Path, change: dict[str, Any], message: str
):
    if "fields" in change:
        change = {"data": replace(second.data, fields=(*change["fields"], *second.data.fields[1:]))}
    experiment = replace(second, cached=True, workdir=str(tmp_path / "run"), **change)
    with pytest.raises(UserError, match=message):
        run.run("second", experiment)


def test_a_model_whose_loss_reads_images_is_refused():
    model = build(vae.Config(image_size=8, channels=1, levels=17, latent=2, widths=(8,), mixtures=1))
    with pytest.raises(UserError, match=r"cached is for models whose loss reads what a frozen part makes of an image"):
        staged(model)
