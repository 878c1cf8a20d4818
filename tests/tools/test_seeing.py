"""A run of a model that sees, by the commands: its answers and its captions are measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.presets import presets
from experiments.run import run
from tools.data import OtherData
from tools.evaluate import evaluate
from vlm_jax.data import VisualCaption, VisualQuestion
from vlm_jax.data.conversation import LINE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seeing_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a few steps of a small LLaVA, begun with nothing, on emoji and questions about shapes."""
    workdir = tmp_path_factory.mktemp("seeing") / "run"
    preset = presets()["llava-tiny"][1]
    tower = replace(preset.model.vision.transformer, width=8, depth=2, heads=2, mlp=8)
    decoder = replace(preset.model.language.decoder, width=8, depth=1, mlp=8)
    language = replace(preset.model.language, decoder=decoder)
    model = replace(preset.model, vision=replace(preset.model.vision, transformer=tower), language=language)
    fields = (VisualQuestion(template=LINE), VisualCaption(template=LINE))
    both = {"name": "openmoji", "mixture": (("easy_vqa", 1.0),), "train": "train[:5%]", "validation": None}
    data = replace(preset.data, fields=fields, pack=True, **both)
    training = replace(preset.training, steps=2, batch_size=8, checkpoint_every=2)
    small = replace(preset, model=model, data=data, training=training, start=(), frozen=())
    run("llava-tiny", replace(small, workdir=str(workdir), data_dir=str(data_dir)))
    return workdir


def test_captions_are_measured_of_data_that_have_them(seeing_run: Path) -> None:
    results = evaluate(seeing_run, split="test[:5%]")
    measured = {name.split("/")[0] for name in results if "/" in name}
    assert measured == {"captions", "perplexity", "kneser_ney"}
    assert 0 <= results["captions/exact_match"] <= 1 and results["captions/cider"] >= 0
    groups = [value for name, value in results.items() if name.startswith("captions/captions_")]
    assert sum(groups) == 20
    # Packed or not, what is predicted is the same, but for captions of one drawing beyond its first.
    assert results["captions/nats_a_token"] == pytest.approx(6.2, abs=0.5)


def test_answers_are_measured_of_data_that_ask(seeing_run: Path) -> None:
    results = evaluate(seeing_run, data=OtherData(name="easy_vqa"), split="test[:40]", only=("vqa",))
    assert results["vqa/exact_match"] == 0 == results["vqa/blind_exact_match"]
    assert sum(value for name, value in results.items() if name.startswith("vqa/questions_")) == 40
    assert results["vqa/yes_rate"] == 0 < results["vqa/yes_rate_of_the_truth"] < 1
