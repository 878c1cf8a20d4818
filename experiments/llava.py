"""Language models that see: LLaVA (2304.08485; 2310.03744), in two stages.

Stage 1 trains the projector alone, by captions; stage 2 goes on from it and trains the language model too. The image
tower and the language model are those of other runs, in the directories that `start` names (`--start.0.workdir DIR`).
"""

from dataclasses import replace

from experiments.clip import clip_small
from experiments.language import language_tiny
from vlm_jax.data import Data, Image, Text
from vlm_jax.data.conversation import LINE, PLAIN, V1, VisualCaption, VisualDialogue, VisualQuestion
from vlm_jax.experiment import Experiment
from vlm_jax.lora import KERNELS, LoRA
from vlm_jax.models import language, llava
from vlm_jax.start import Start
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

PARTS = (r"^vision/", r"^language/")
"""What stage 1 does not train."""
ADAPTED = rf"^language/.*{KERNELS}"
"""The kernels of the language model that have adapters: all but the head, as in LLaVA-1.5's recipe."""


def parts(tower: str, text: str) -> tuple[Start, ...]:
    """What stage 1 begins with, of the runs of a CLIP and of a language model."""
    return Start(workdir=tower, take="image", into="vision"), Start(workdir=text, into="language")


def seen(template: str | None, vocab_size: int, *mixture: tuple[str, float]) -> Data:
    """Questions about shapes, and what else the mixture names, several in a row, each with its image.

    Args:
      template: of the conversations; None: the tokenizer's own.
    """
    return Data(
        name="easy_vqa",
        mixture=mixture,
        fields=(
            VisualQuestion(template=template),
            VisualDialogue(template=template),
            VisualCaption(template=template),
        ),
        pack=True,
        text=Text(vocab_size=vocab_size),
    )


CAPTIONS = (("mosaic/captions", 4.0), ("easy_vqa/captions", 1.0), ("openmoji", 1.0))
"""What stage 1 sees beside questions about one shape, in rows for one of these."""
QUESTIONS = (
    ("easy_vqa/dialogues", 2.0),
    ("mosaic", 0.5),
    ("mosaic/dialogues", 3.0),
    ("mosaic/captions", 2.0),
    ("openmoji", 0.5),
    ("easy_vqa/captions", 0.3),
)
"""What stage 2 does."""
TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's chat template without the sentence that its own begins with: a third of the tokens."""


def tiny() -> llava.Config:
    """The tower of `clip-small` and the model of `language-tiny`, with room for four short conversations."""
    text = language_tiny().model
    return llava.Config(
        vision=replace(clip_small().model.image, features=1),
        language=replace(text, context_length=128, decoder=replace(text.decoder, dropout=0.0)),
        shuffle=2,
        images=4,
    )


def llava_tiny_projector() -> Experiment:
    """Stage 1 of `llava-tiny`: `clip-small` and `language-tiny` stay, what is between them learns; minutes on a CPU."""
    return Experiment(
        model=tiny(),
        data=seen(LINE, 512, *CAPTIONS),
        training=Training(
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=20, eps=1e-6),
            steps=400,
            batch_size=64,
            checkpoint_every=100,
        ),
        start=parts("runs/clip-small", "runs/language-tiny"),
        frozen=PARTS,
    )


def llava_tiny() -> Experiment:
    """Answers questions about coloured shapes and names emoji, on `clip-small` and `language-tiny`; on a CPU.

    `python -m experiments.run llava-tiny-projector` comes before it (5 minutes of two cores; this takes 17, at
    1.57 steps a second), and
    `clip-small` and `language-tiny` before that. `python -m tools.evaluate runs/llava-tiny`: 99.5% of 9,673 held-out
    answers are right, of the open ones 99.3%; without the image 64.0% and 21.4%. Of 2,000 about mosaics (`--data.name
    mosaic`) 67.8 ± 1.1% where a guess has 34.0%: the colour of a place 98%, its shape 67%, how many 46%, yes or no
    68%. Of 400 held-out emoji (`--data.name openmoji`) 12.5% are named in the very words.
    """
    return Experiment(
        model=tiny(),
        data=seen(LINE, 512, *QUESTIONS),
        training=Training(
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=60, multiples=(("^projector/", 0.5),), eps=1e-6),
            steps=1600,
            batch_size=64,
            checkpoint_every=200,
        ),
        start=(Start(workdir="runs/llava-tiny-projector"),),
        frozen=(r"^vision/",),
    )


def smollm2() -> llava.Config:
    """The tower of `clip-small` and SmolLM2-135M, whose 64 patches are 16 tokens."""
    return llava.Config(
        vision=replace(clip_small().model.image, features=1),
        language=replace(language.SMOLLM2_135M, context_length=256),
        shuffle=2,
        images=7,
    )


def llava_smollm2_projector() -> Experiment:
    """Stage 1 of `llava-smollm2`: `clip-small` and SmolLM2-135M stay, what is between them learns.

    `python -m tools.convert smollm2-135m-instruct runs/smollm2` comes before it.
    """
    return Experiment(
        model=smollm2(),
        data=seen(TURNS, 49_152, *CAPTIONS),
        training=Training(
            optimizer=Optimizer(learning_rate=1e-3, warmup_steps=5),
            steps=40,
            batch_size=8,
            checkpoint_every=20,
        ),
        start=parts("runs/clip-small", "runs/smollm2"),
        frozen=PARTS,
    )


def llava_smollm2() -> Experiment:
    """SmolLM2-135M sees: adapters of rank 16 and the projector learn to answer questions and to name emoji.

    `python -m tools.evaluate runs/llava-smollm2 --split "test[:1000]"`: 87.7 ± 1.1% of 1,000 held-out answers are
    right, of the open ones 97.0%; without the image 67.3% and 21.6%. What questions of yes or no are about it has not
    learned to look at: 84.3%, without the image 84.0%. Nor mosaics (`--data.name mosaic --split "test[:500]"`): 35.4 ±
    2.1%, where a guess has 34.0%.
    """
    return Experiment(
        model=smollm2(),
        data=seen(TURNS, 49_152, *QUESTIONS),
        training=Training(
            optimizer=Optimizer(learning_rate=1e-3, warmup_steps=5, multiples=(("^projector/", 0.5),)),
            steps=240,
            batch_size=8,
            checkpoint_every=40,
        ),
        start=(Start(workdir="runs/llava-smollm2-projector"),),
        frozen=(r"^vision/", r"^language/"),
        lora=LoRA(rank=16, alpha=32.0, pattern=ADAPTED),
    )


def published(
    model: llava.Config,
    start: tuple[Start, ...],
    frozen: tuple[str, ...],
    data: Data,
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
) -> Experiment:
    """A stage of 2310.03744, appendix A: AdamW without decay, a warm-up of 3% and a half cosine, bfloat16."""
    return Experiment(
        model=model,
        data=data,
        training=Training(
            optimizer=Optimizer(learning_rate=learning_rate, warmup_steps=round(0.03 * steps)),
            steps=steps,
            batch_size=batch_size,
            checkpoint_every=1000,
        ),
        start=start,
        frozen=frozen,
        frozen_dtype="bfloat16",
    )


def projector(model: llava.Config, size: str) -> Experiment:
    """Stage 1, on the 558,000 captions that LLaVA-1.5 chose of LAION, CC and SBU."""
    start = parts("runs/clip-vit-l14-336", f"runs/vicuna-{size}-v1.5")
    text = Text(vocab_size=model.language.vocab_size)
    data = Data(name="llava_pretrain", fields=(VisualCaption(template=PLAIN),), text=text)
    return published(model, start, PARTS, data, learning_rate=1e-3, steps=2180, batch_size=256)


def instructed(model: llava.Config, size: str) -> Experiment:
    """Stage 2, on its mixture of 665,000 conversations: one rate for the projector and the language model.

    The recipe of its adapters is `--lora.rank 128 --lora.alpha 256 --optimizer.learning-rate 2e-4`, with a tenth of
    the rate for the projector (`--optimizer.multiples ^projector/ 0.1`) and PARTS frozen.
    """
    start = (Start(workdir=f"runs/llava-v1-5-{size}-projector"),)
    text = Text(vocab_size=model.language.vocab_size)
    image = Image(resize="pad", pad_colour=(122, 116, 104))  # CLIP's mean
    data = Data(name="llava_instruct", fields=(VisualQuestion(template=V1, image=image),), text=text)
    return published(model, start, (r"^vision/",), data, learning_rate=2e-5, steps=5197, batch_size=128)


def llava_v1_5_7b_projector() -> Experiment:
    """Stage 1 of LLaVA-1.5 7B (2310.03744): 7.06B parameters, of which the projector's 21 million train.

    Needs CLIP ViT-L/14 at 336 pixels and Vicuna v1.5 7B, converted (`tools.convert`), captioned images that TFDS has
    prepared (--data.name), and --mesh.fsdp.
    """
    return projector(llava.LLAVA_1_5_7B, "7b")


def llava_v1_5_7b() -> Experiment:
    """Stage 2 of LLaVA-1.5 7B (2310.03744): projector and language model train, the tower stays."""
    return instructed(llava.LLAVA_1_5_7B, "7b")


def llava_v1_5_13b_projector() -> Experiment:
    """Stage 1 of LLaVA-1.5 13B (2310.03744): 13.35B parameters. Needs what the 7B does, with Vicuna v1.5 13B."""
    return projector(llava.LLAVA_1_5_13B, "13b")


def llava_v1_5_13b() -> Experiment:
    """Stage 2 of LLaVA-1.5 13B (2310.03744)."""
    return instructed(llava.LLAVA_1_5_13B, "13b")


PRESETS = (
    llava_tiny_projector,
    llava_tiny,
    llava_smollm2_projector,
    llava_smollm2,
    llava_v1_5_7b_projector,
    llava_v1_5_7b,
    llava_v1_5_13b_projector,
    llava_v1_5_13b,
)
