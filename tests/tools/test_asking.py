"""Questions about pictures by the commands: answers, their sheet, and a folder's captions as lines."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from experiments.run import run
from smallest import LLAVA
from tools.asking import Asking, check_images, folder
from tools.sample import Options, sample
from vlm_jax.chat import Speaker
from vlm_jax.contract import Input, Model
from vlm_jax.data import Data, Text, VisualCaption, VisualQuestion, train_tokenizer
from vlm_jax.data.conversation import LINE, PLAIN
from vlm_jax.errors import UserError
from vlm_jax.experiment import Experiment
from vlm_jax.models import llava
from vlm_jax.models.language import Sampling
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

LENGTH = 64
SEES = {
    "tokens": Input((LENGTH,), "int32", 400),
    "target": Input((LENGTH,), "bool"),
    "segment": Input((LENGTH,), "int32", LENGTH + 1),
    "image": Input((1, 4, 4, 3), "uint8", 256),
    "image_at": Input((1,), "int32", LENGTH + 1, span=2),
}
GREEDY = Asking(temperature=0.0, seed=0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    directory = tmp_path / "pictures"
    directory.mkdir()
    for number in range(20):
        Image.new("RGB", (9, 7), (10 * number, 0, 0)).save(directory / f"{number:02}.png")
    (directory / "note.txt").write_text("no picture")
    return directory


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    """A model that says how red an image is."""
    tokenizer = train_tokenizer(["0 1 2 3 4 5 6 7 8 9"], 300)
    digits = jnp.array([tokenizer.tokenizer.encode(str(digit)).ids[0] for digit in range(10)], jnp.int32)

    def generate(variables, key, batch, *, order=("text",), temperature=1.0, sampling=None):
        red = batch["image"][:, 0, 2, 2, 0].astype(jnp.int32) // 10
        written = digits[jnp.stack([red // 10, red % 10], axis=1)]
        ones = jnp.ones_like(written)
        return {
            "tokens": jnp.concatenate([batch["tokens"], written], axis=1),
            "target": jnp.concatenate([batch["target"], ones > 0], axis=1),
            "segment": jnp.concatenate([batch["segment"], ones], axis=1),
        }

    model = Model(inputs=SEES, init=None, loss=None, rules=(), sampling=Sampling(length=2), generate=generate)
    return Speaker(model, {}, tokenizer, (VisualQuestion(template=LINE),))


def test_a_folder_gets_a_line_for_each_picture_in_the_order_of_the_names(speaker, pictures, tmp_path) -> None:
    out = tmp_path / "new" / "captions.jsonl"
    assert folder(speaker, "how red?", pictures, out, GREEDY) == out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [
        {"image": f"{number:02}.png", "prompt": "how red?", "answer": " ".join(f"{number:02}")} for number in range(20)
    ]


def test_a_damaged_picture_is_told_before_any_is_asked_about_and_nothing_is_written(
    speaker, pictures, tmp_path
) -> None:
    Image.effect_noise((40, 40), 50).save(pictures / "19.png")
    (pictures / "19.png").write_bytes((pictures / "19.png").read_bytes()[:300])
    silent = speaker._replace(model=replace(speaker.model, generate=lambda *_, **__: pytest.fail("it was asked")))
    with pytest.raises(UserError, match=r"19\.png has an image that cannot be used .*: give another picture"):
        folder(silent, "", pictures, tmp_path / "captions.jsonl", GREEDY)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none has no pictures: give a directory that has some"):
        folder(silent, "", tmp_path / "none", tmp_path / "captions.jsonl", GREEDY)
    assert not (tmp_path / "captions.jsonl").exists()


@pytest.mark.parametrize(
    ("images", "prompts", "out", "message"),
    [
        (("",), (), None, r"pictures is a directory: its answers go to --out FILE\.jsonl"),
        (("",), (), "a.png", r"pictures is a directory: its answers go to --out FILE\.jsonl"),
        (("", "00.png"), (), "a.jsonl", "pictures is a directory: give it alone, with one --prompt at most"),
        (("",), ("a", "b"), "a.jsonl", "pictures is a directory: give it alone, with one --prompt at most"),
        (
            ("00.png",),
            (),
            "a.jsonl",
            r"--out is a\.jsonl, which holds the answers to --image DIRECTORY: end it in \.png",
        ),
        (("note.txt",), (), None, r"note\.txt is no image of a kind that Pillow knows: give a PNG"),
        (("none.png",), (), None, r"the image .*none\.png cannot be read \(No such file or directory\): give the path"),
    ],
)
def test_what_is_no_image_and_what_does_not_go_together_is_refused(pictures, images, prompts, out, message) -> None:
    with pytest.raises(UserError, match=message):
        check_images([pictures / name for name in images], prompts, None if out is None else Path(out))


@pytest.fixture(scope="module")
def seeing_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of two steps of a tiny model that sees, on questions and captions in packed rows."""
    workdir = tmp_path_factory.mktemp("seeing") / "run"
    config = replace(
        LLAVA,
        vision=replace(LLAVA.vision, image_size=8, patch_size=4),
        language=replace(LLAVA.language, vocab_size=300, context_length=64),
    )
    assert isinstance(config, llava.Config) and config.images > 1
    data = Data(
        name="easy_vqa",
        mixture=(("openmoji", 1.0),),
        train="train[:60]",
        validation="train[60:90]",
        fields=(VisualQuestion(template=LINE), VisualCaption(template=PLAIN)),
        pack=True,
        text=Text(vocab_size=300),
    )
    optimizer = Optimizer(learning_rate=1e-3)
    training = Training(optimizer=optimizer, steps=2, batch_size=8, checkpoint_every=2)
    run("seeing", Experiment(model=config, data=data, training=training, workdir=str(workdir), data_dir=str(data_dir)))
    return workdir


@pytest.mark.slow
def test_a_run_that_sees_is_trained_on_packed_rows_asked_and_drawn(seeing_run, pictures, tmp_path, capsys) -> None:
    images = (pictures / "00.png", pictures / "19.png")
    out = tmp_path / "sheet.png"
    options = Options(prompt=("what color?",), image=images[:1], out=out, sampling=Sampling(length=4), temperature=0.0)
    (text,) = sample(seeing_run, options)
    with Image.open(out) as sheet:
        assert sheet.width > 100
    loaded = vlm_jax.load(seeing_run)
    asked = {"sampling": Sampling(length=4), "temperature": 0.0}
    assert loaded.chat(["what color?"], images[:1], **asked) == [text]
    # Alone and beside others, shorter and longer, it is the same.
    both = loaded.chat(["is it <image> or <image>?", "no?"], images, **asked)
    assert both == [loaded.chat([prompt], images, **asked)[0] for prompt in ("is it <image> or <image>?", "no?")]
    pixels = np.asarray(Image.open(images[0]))
    assert loaded.chat(["what color?"], [pixels], **asked) == [text]
    captions = sample(seeing_run, replace(options, prompt=(), image=(pictures,), out=tmp_path / "captions.jsonl"))
    assert isinstance(captions, Path) and len(captions.read_text().splitlines()) == 20
    held_out = sample(seeing_run, replace(options, prompt=(), image=(), num=3, out=tmp_path / "held-out.png"))
    assert isinstance(held_out, Path)
    with Image.open(held_out) as sheet:
        assert sheet.width > 100


@pytest.mark.slow
def test_a_model_of_images_alone_takes_none_to_be_asked_about(vae_run, pictures) -> None:
    with pytest.raises(UserError, match="holds a model that takes no --image: leave it out"):
        sample(vae_run, Options(image=(pictures / "00.png",)))
