"""The networks that the benchmark compares with have the preset's sizes, and both of a pair run."""

from dataclasses import replace

import pytest

from experiments.presets import presets
from tools.benchmark import random_batch
from tools.peers import compare

PRESETS = presets()


@pytest.mark.parametrize(
    ("library", "preset"),
    [
        ("transformers", "autoregressive-tiny"),
        ("transformers", "clip-tiny"),
        ("diffusers", "diffusion-tiny"),
        ("diffusers", "diffusion-tiny-flow"),
    ],
)
def test_the_peer_of_a_preset_has_its_sizes(library: str, preset: str) -> None:
    """But for what one has and the other has not: a schedule, a norm, the pixels above, a word that begins."""
    experiment = PRESETS[preset][1]
    training = replace(experiment.training, steps=1, batch_size=2)
    results = compare(replace(experiment, training=training), library, random_batch)
    assert 0.85 < results["peer/parameters"] / results["parameters"] < 1.05
    assert results["timed"] == ("decoding" if preset == "autoregressive-tiny" else "train step")
    for unit in ("seconds", "cpu_seconds"):
        assert results[f"{unit}_ratio"] == results[f"peer/{unit}_min"] / results[f"{unit}_min"]
    if preset == "autoregressive-tiny":
        assert results["tokens_per_second"] == 2 * 64 / results["seconds_min"]
