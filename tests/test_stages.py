"""What frozen parts make of images, made once: the same steps as where it is made each time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import run
from experiments.data import DIGITS, OPENMOJI, TINY
from experiments.presets import presets
from smallest import DIT, PYRAMID
from vlm_jax.data import Image
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import autoencoder, build, latent_diffusion, probability_flow, vae
from vlm_jax.nn.image_patches import UNetPatches
from vlm_jax.stages import STAGES, staged
from vlm_jax.start import Start

FIRST = autoencoder.Config(image_size=8, channels=1, levels=17, network=replace(PYRAMID, dropout=0.0), latent=2)
OPTIMIZER = replace(TINY.optimizer, schedule="constant")
FEW = replace(OPENMOJI, train="train[:2%]", test="test[:2%]")
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


def without_stages(data_dir: Path, into: Path) -> Path:
    """The data that are there, without others' stages."""
    into.mkdir()
    for each in data_dir.glob("*"):
        if each.name != STAGES:
            (into / each.name).symlink_to(each)
    return into


def losses(workdir: Path) -> list[tuple[float, float | None]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line.get("validation_loss")) for line in lines]


@pytest.mark.slow
def test_the_steps_of_a_run_are_those_of_one_whose_stages_are_cached(
    second: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Loss, validation and all; a second run of the same first stage finds the file, and goes on with or without it."""
    data = replace(second.data, validation="test")
    data_dir = without_stages(Path(second.data_dir).expanduser(), tmp_path / "data")
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


def mixed(name: str, directory: Path, data_dir: Path, **settings: Any) -> Experiment:
    """A decoder of texts and images of a few emoji, and what it begins with, of no steps but one."""
    preset = presets()[f"{name}-tiny"][1]
    (start,) = preset.start
    begun = Path(start.workdir).name
    small = replace(presets()[begun][1], data=replace(FEW, text=None), data_dir=str(data_dir))
    first = replace(small.model, image_size=32)
    if not (directory / begun).exists():
        training = replace(small.training, steps=1, batch_size=8, checkpoint_every=1, micro_steps=1)
        run.run(begun, replace(small, model=first, training=training, workdir=str(directory / begun)))
    decoder = replace(preset.model.language.decoder, width=16, depth=1, heads=2, kv_heads=2, head_width=8, mlp=16)
    model: Any = replace(preset.model, language=replace(preset.model.language, decoder=decoder))
    if name == "chameleon":
        model = replace(model, first=first)
    else:
        patches = UNetPatches(widths=(8, 16), blocks=1, groups=2)
        model = replace(model, image=replace(model.image, first=first, patches=patches))
    return replace(
        preset,
        model=model,
        data=replace(FEW, fields=preset.data.fields, text=preset.data.text, validation="test[:2%]", **settings),
        data_dir=str(data_dir),
        training=replace(TRAINING, seed=1, batch_size=8, log_every=1),
        start=(replace(start, workdir=str(directory / begun)),),
        workdir=str(directory / "run"),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pack"), [("chameleon", False), ("chameleon", True), ("transfusion", False)])
def test_rows_with_images_hold_the_stage_of_each(
    name: str, pack: bool, tmp_path_factory: pytest.TempPathFactory, data_dir: Path, tmp_path: Path
):
    """Of several images a row where they are packed; codes as they are, and latents drawn anew each time."""
    own = without_stages(data_dir, tmp_path / "data")
    plain = mixed(name, tmp_path_factory.getbasetemp() / "mixed", own)
    if pack:
        model = replace(plain.model, images=3, language=replace(plain.model.language, context_length=240))
        plain = replace(plain, model=model, data=replace(plain.data, fields=plain.data.fields[:1], pack=True))
    plain, cached = (
        replace(plain, cached=cached, workdir=str(tmp_path / f"cached-{cached}")) for cached in (False, True)
    )
    run.run(name, plain)
    run.run(name, cached)
    found, expected = (np.array(losses(tmp_path / f"cached-{each}"), float) for each in (True, False))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(list((own / STAGES).iterdir())) == 2


def test_a_model_whose_loss_reads_images_is_refused():
    model = build(vae.Config(image_size=8, channels=1, levels=17, latent=2, widths=(8,), mixtures=1))
    with pytest.raises(UserError, match=r"cached is for models whose loss reads what a frozen part makes of an image"):
        staged(model)
