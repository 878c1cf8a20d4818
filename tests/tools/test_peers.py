"""The comparison with other libraries: what is refused, and how the two are timed."""

import configparser
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.autoregressive import autoregressive_igpt_s, autoregressive_tiny
from experiments.clip import clip_tiny
from experiments.diffusion import diffusion_tiny
from experiments.vae import vae_tiny
from tools import peers
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models.clip import SIGLIP_VIT_B16


@pytest.mark.parametrize(
    ("library", "preset"),
    [
        ("diffusers", vae_tiny),
        ("diffusers", clip_tiny),
        ("transformers", diffusion_tiny),
        ("transformers", lambda: replace(clip_tiny(), model=SIGLIP_VIT_B16)),
        ("open_clip", autoregressive_tiny),
    ],
)
def test_a_preset_without_a_peer_is_refused(library: str, preset: Callable[[], Experiment]) -> None:
    with pytest.raises(UserError, match=f"this preset has no peer in {library}: --against diffusers is for U-Nets"):
        peers.check_peer(library, preset().model)


@pytest.mark.parametrize(
    ("library", "preset"),
    [("diffusers", diffusion_tiny), ("transformers", autoregressive_tiny), ("open_clip", clip_tiny)],
)
def test_a_library_that_is_not_installed_is_named_with_the_command_that_installs_it(
    library: str, preset: Callable[[], Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    extra = peers.LIBRARIES[library]
    with pytest.raises(UserError, match=rf"--against {library} needs an extra: run `pip install -e '.\[{extra}\]'`"):
        peers.check_peer(library, preset().model)
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    assert library in setup["options.extras_require"][extra]


def test_both_compute_in_float32_without_dropout_and_are_else_the_preset() -> None:
    config = autoregressive_igpt_s().model
    dropping = replace(config, transformer=replace(config.transformer, dropout=0.1))
    assert config.transformer.dtype == "bfloat16"
    assert peers.plain(dropping) == replace(config, transformer=replace(config.transformer, dtype="float32"))


def test_the_two_run_turn_about_and_their_least_times_after_the_first_rounds_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that `run` puts forward: by less in the rounds that warm up than in any that counts."""
    now, runs = [0.0, 0.0], []
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(peers.time, "process_time", lambda: now[1])

    def contender(name: str, seconds: list[float]) -> Callable[[], None]:
        durations = iter([0.25] * peers.WARM_UP + seconds)

        def run() -> None:
            runs.append(name)
            duration = next(durations)
            now[0] += duration
            now[1] += 2 * duration

        return run

    least = peers.alternate(contender("ours", [4, 1, 2]), contender("theirs", [3, 5, 3]), rounds=3)
    np.testing.assert_array_equal(least, [[1, 2], [3, 6]])
    assert runs == ["ours", "theirs"] * (peers.WARM_UP + 3)
