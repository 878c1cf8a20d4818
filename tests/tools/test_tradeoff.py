"""The table of arms at equal compute: what the rule says of known items, and every arm from its training to its row."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.presets import presets
from tools import tradeoff
from tools.compute import spent_flops, step_flops
from tools.evaluate import load_judges
from tools.tradeoff import measure, train
from tools.verdict import (
    ARMS,
    BESIDE,
    ONE_STAGE,
    READERS,
    READS,
    TWO_STAGES,
    Items,
    apart,
    decision,
    draw,
    drawing,
    reading,
    table,
)
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.sharding import MeshShape, make_mesh

N = 400


def arm(nats: float, answers: float, recall: float | None = None, seed: int = 0, shapes: float = 0.5) -> Items:
    """Items of known means: nats a token, the share of open answers, and that of drawings that find their caption."""
    rng = np.random.default_rng(seed)

    def share(mean: float) -> np.ndarray:
        return rng.permutation(np.arange(N) < round(mean * N))

    items: Items = {
        "flops": np.array([1e14]),
        "first_stage_flops": np.array([3e13]),
        "caption_nats": 4 * nats + 0.1 * rng.permutation(np.linspace(-1, 1, N)),
        "caption_tokens": np.full(N, 4),
        "caption_right": share(0.1),
        "caption_group": np.array(["new_word", "new_combination"] * (N // 2)),
        "easy_vqa_right": share(answers),
        "easy_vqa_blind_right": share(0.2),
        "easy_vqa_open": np.ones(N, bool),
        "mosaic_right": share(0.5),
        "mosaic_blind_right": share(0.3),
        "curve_flops": np.array([5e13, 1e14]),
        "curve_nats": np.array([nats + 1, nats]),
    }
    if recall is not None:
        items |= {f"found_by_{judge}": share(recall) for judge in "ab"}
        items |= {f"{kind}_found_by_{judge}": share(0.1) for kind in ("nearest_caption", "real") for judge in "ab"}
        items |= {f"{kind}shapes_found_by_{judge}": share(shapes) for kind in ("", "real_") for judge in "ab"}
        items |= {"near_copies": np.array([0.0]), "bits_per_dim": np.array([1.5, 0.1]), "bound": np.array(["lower"])}
    return items


def all_arms(pixels: Items, recall: float = 0.4) -> dict[str, Items]:
    return {
        "reader": arm(2.0, 0.9, seed=1),
        "encoder-free": arm(2.5, 0.8, seed=2),
        "chameleon": arm(2.2, 0.85, 0.3, seed=3),
        "transfusion": arm(2.2, 0.85, recall, seed=4),
        "pixels": pixels,
        "coded-pixels": arm(2.5, 0.5, 0.3, seed=6),
    }


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (arm(1.9, 0.95, 0.5, seed=5), "Closed, by R@10: pixels reads"),
        (arm(2.0, 0.9, 0.4, seed=5), "Closed, by R@10: pixels reads"),
        (arm(2.1, 0.95, 0.5, seed=5), "Open, by R@10: no one-stage arm"),
        (arm(1.9, 0.7, 0.5, seed=5), "Open, by R@10: no one-stage arm"),
        (arm(1.9, 0.95, 0.3, seed=5), "Open, by R@10: no one-stage arm .* of transfusion in drawing"),
    ],
)
def test_the_rule_asks_for_reading_and_for_drawing(pixels: Items, expected: str):
    assert re.match(expected, decision(all_arms(pixels)))


@pytest.mark.parametrize(
    ("recall", "pixels", "expected"),
    [
        (0.12, arm(1.9, 0.95, 0.3, seed=5, shapes=0.7), "Closed, by drawn shapes: pixels reads"),
        (0.12, arm(1.9, 0.95, 0.3, seed=5, shapes=0.4), "Open, by drawn shapes: no one-stage arm"),
        (0.01, arm(1.9, 0.95, 0.3, seed=5, shapes=0.7), "Closed, by drawn shapes: pixels reads"),
        (0.2, arm(1.9, 0.95, 0.1, seed=5, shapes=0.7), "Open, by R@10: no one-stage arm"),
    ],
)
def test_where_drawings_find_captions_no_better_than_the_nearest_captions_pictures_shapes_decide(
    recall: float, pixels: Items, expected: str
):
    assert re.match(expected, decision(all_arms(pixels, recall)))


def test_without_an_arm_that_the_rule_compares_nothing_is_decided():
    arms = all_arms(arm(1.9, 0.95, 0.5))
    del arms["reader"], arms["chameleon"]
    assert decision(arms) == "Undecided: there is no reader and no chameleon yet."


def test_the_table_has_a_line_for_each_arm_and_marks_the_missing():
    arms = all_arms(arm(2.0, 0.9, 0.5, seed=5))
    del arms["encoder-free"]
    halves = [each.splitlines() for each in table(arms).split("\n\n")[:2]]
    for half, names in zip(halves, (ARMS, (*TWO_STAGES, *ONE_STAGE, "chance", *BESIDE)), strict=True):
        assert [line.split(" | ")[0][2:] for line in half[2:]] == list(names)
        assert len({line.count("|") for line in half}) == 1
    assert halves[0][3].startswith("| encoder-free | not there |")
    assert reading(arms["transfusion"], 2.2)[:3] == ["3.0e+13", "1.0e+14", "2.200 ± 0.001"]
    assert reading(arms["transfusion"], 2.2)[-1] == "1.0e+14" and not reading(arms["transfusion"], 2.0)[-1]
    assert drawing(arms["transfusion"])[0] == "40.0 ± 1.7%"  # of two judges, whose votes are independent
    assert drawing(arms["transfusion"])[-1] == "1.500 ± 0.100 (lower)"
    assert draw(arms).axes and draw({}).axes


def test_beneath_the_table_stands_how_far_apart_are_those_that_the_rule_compares():
    arms = all_arms(arm(2.1, 0.95, 0.5, seed=5))
    told = table(arms).split("\n\n")[2].splitlines()
    assert [line.split(":")[0] for line in told] == [f"- {name}" for name in ONE_STAGE]
    nats, answers, drawn = apart(arms["pixels"], arms["reader"], arms["transfusion"], "")
    assert nats.mean == pytest.approx(0.1, abs=0.01) and drawn.mean == pytest.approx(0.1, abs=0.05)
    assert told[0].startswith(f"- pixels: {nats.mean:+.3f} ± {nats.error:.3f} nats and {100 * answers.mean:+.1f} ± ")
    assert told[0].endswith("% of R@10 beside transfusion's.")


def test_an_arm_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="there is no arm vae: choose from reader, encoder-free"):
        tradeoff.tradeoff(arms=("vae",))


def shrunk(name: str, experiment: Experiment, known: dict[str, Experiment]) -> Experiment:
    """At 32x32 pixels, of width 96 and depth 4, on a few records."""
    model: Any = experiment.model
    if name == "clip-small":
        model = replace(model, image=replace(model.image, image_size=32))
    elif name in ("vqvae-tiny", "autoencoder-tiny"):
        model = replace(model, image_size=32)
    else:
        decoder = replace(model.language.decoder, width=96, depth=4, heads=3, kv_heads=3, mlp=192)
        model = replace(model, language=replace(model.language, decoder=decoder))
        if name.endswith("reader"):
            model = replace(model, vision=replace(model.vision, image_size=32))
        elif name.endswith("chameleon"):
            model = replace(model, first=known["vqvae-tiny"].model)
        elif name.endswith("transfusion"):
            model = replace(model, image=replace(model.image, first=known["autoencoder-tiny"].model))
        else:
            model = replace(model, image=replace(model.image, image_size=32, masked_from=1))
    data = replace(experiment.data, train="train[:4%]", validation=None, test="test[:2%]")
    training = replace(experiment.training, steps=2, batch_size=16, checkpoint_every=1)
    sampling = experiment.sampling
    if hasattr(sampling, "steps"):
        sampling = replace(sampling, steps=2)
    return replace(experiment, model=model, data=data, training=training, sampling=sampling)


@pytest.fixture(scope="module")
def small() -> dict[str, Experiment]:
    known = {name: experiment for name, (_, experiment) in presets().items()}
    names = ("clip-small", "vqvae-tiny", "autoencoder-tiny", *(f"tradeoff-{name}" for name in ARMS))
    for name in names:
        known[name] = shrunk(name, known[name], known)
    return known


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tradeoff")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_reads_and_draws(
    name: str, small: Any, runs: Path, data_dir: Path, clip_run: Path, monkeypatch: pytest.MonkeyPatch
):
    """For two steps of a budget, with what it begins with; the same command again trains nothing."""
    monkeypatch.setattr(tradeoff, "BATCH", 16)
    monkeypatch.setattr("vlm_jax.evals.likelihood.NOISE_DRAWS", 16)
    monkeypatch.setattr(tradeoff, "QUESTIONS", {"easy_vqa": "test[:12]", "mosaic": "test[:12]"})
    monkeypatch.setattr(tradeoff, "SHAPES", ("easy_vqa/captions", "test[:12]"))
    monkeypatch.setattr("vlm_jax.evals.recognition.DRAWS", 1)
    path, preset = runs / f"tradeoff-{name}-0", f"tradeoff-{name}"
    for start in small[preset].start:
        first = Path(start.workdir).name
        train(first, small, runs / first, runs, str(data_dir))
    spent = sum(spent_flops(runs / Path(start.workdir).name) for start in small[preset].start)
    budget = spent + 2.5 * step_flops(small[preset])
    for _ in range(2):
        train(preset, small, path, runs, str(data_dir), flops=budget, seed=3)
    assert spent_flops(path) == pytest.approx(spent + 2 * step_flops(small[preset]))
    with pytest.raises(UserError, match=r"FLOPs leave tradeoff-.* no step beside the .*: ask for more --flops"):
        train(preset, small, runs / "poor", runs, str(data_dir), flops=spent / 1e99)
    mesh = make_mesh(MeshShape())
    judges = load_judges((clip_run,), mesh)
    found = measure(path, judges or (), mesh, str(data_dir), seed=0, sheet=runs / "sheet.png")
    assert (runs / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert np.isfinite(found["caption_nats"]).all() and (found["caption_tokens"] > 0).all()
    assert len(found["easy_vqa_right"]) == len(found["easy_vqa_blind_right"]) == 12
    assert len(found["curve_nats"]) == 2 and np.isfinite(found["curve_nats"]).all()
    last = found["caption_nats"].sum() / found["caption_tokens"].sum()  # of the checkpoint that had all the compute
    assert found["curve_nats"][-1] == pytest.approx(last, rel=1e-5)
    assert ("shapes_found_by_run" in found) == ("near_copies" in found) == (name not in READERS)
    assert len(reading(found, 2.0)) == len(READS) - 1
