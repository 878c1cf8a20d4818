"""A run on text, by the commands: measured beside a 3-gram, and continued from prompts."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.presets import presets
from experiments.run import run
from tools.evaluate import evaluate
from tools.sample import Options, sample
from vlm_jax.errors import UserError
from vlm_jax.models.language import Sampling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def language_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a few steps of a small language model on the names of emoji."""
    workdir = tmp_path_factory.mktemp("language") / "run"
    preset = presets()["language-tiny"][1]
    model = replace(preset.model, decoder=replace(preset.model.decoder, width=8, depth=1, mlp=8))
    data = replace(preset.data, mixture=(), train="train[:10%]")
    training = replace(preset.training, steps=2, batch_size=8, checkpoint_every=2)
    small = replace(preset, model=model, data=data, training=training, workdir=str(workdir), data_dir=str(data_dir))
    run("language-tiny", small)
    return workdir


def test_it_is_measured_beside_the_three_gram_of_its_training_texts(language_run: Path):
    results = evaluate(language_run)
    measured = {name.split("/")[0] for name in results if "/" in name}
    assert measured == {"perplexity", "kneser_ney"}
    assert results["perplexity/tokens"] == results["kneser_ney/tokens"] > results["examples"]
    assert results["kneser_ney/training_tokens"] > 1000
    # Of two steps the one knows nothing; the other has counted 330 names.
    assert results["kneser_ney/perplexity"] < results["perplexity/perplexity"] < 2 * 512
    assert results["perplexity/bits_per_byte"] > results["kneser_ney/bits_per_byte"] > 0


def test_prompts_are_continued(language_run: Path):
    short = Options(num=2, prompt=("red heart", "flag"), sampling=Sampling(length=4))
    texts = sample(language_run, short)
    assert len(texts) == 4
    assert all(text.startswith(prompt) for text, prompt in zip(texts, ["red heart"] * 2 + ["flag"] * 2, strict=True))
    likeliest = sample(language_run, replace(short, temperature=0.0))
    assert likeliest[0] == likeliest[1] and likeliest == sample(language_run, replace(short, temperature=0.0, seed=1))
    with pytest.raises(UserError, match="takes no --label"):
        sample(language_run, replace(short, label=("1",)))
