"""CLIP and SigLIP."""

from dataclasses import replace

from vlm_jax.data import Caption, Data, Image, Redraw, Text
from vlm_jax.data.class_names import imagenet_prompts
from vlm_jax.experiment import Experiment, ZeroShot
from vlm_jax.models import clip
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.vision import VisionTransformer
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
"""Of the shapes in `easy_vqa`."""


def clip_tiny() -> Experiment:
    """Emoji and their names, 32x32, trained on a CPU in minutes; the main job of the README."""
    return Experiment(
        model=clip.Config(
            image=VisionTransformer(
                image_size=32, patch_size=8, transformer=Transformer(width=128, depth=4, heads=4, mlp=512, scan=False)
            ),
            text=clip.TextTransformer(
                vocab_size=2048,
                context_length=16,
                eos_id=2,
                transformer=Transformer(width=128, depth=2, heads=4, mlp=512, scan=False),
            ),
            embedding=128,
        ),
        data=Data(name="openmoji", fields=(Image(crop_min_area=0.8), Caption()), text=Text(vocab_size=2048)),
        training=Training(
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=40, weight_decay=0.1, b2=0.98, eps=1e-6),
            steps=400,
            batch_size=256,
            checkpoint_every=100,
        ),
        zero_shot=ZeroShot(name="easy_vqa/color", prompts=("{}", "{} circle", "{} square", "{} triangle")),
    )


def small(data: Data, *, width: int = 128, depth: int = 4, steps: int = 800, seed: int = 0) -> Experiment:
    """Drawings of 64x64 pixels in patches of 8 and their captions, trained on a CPU in a quarter of an hour."""
    return Experiment(
        model=clip.Config(
            image=VisionTransformer(
                image_size=64,
                patch_size=8,
                transformer=Transformer(width=width, depth=depth, heads=width // 32, mlp=4 * width, scan=False),
            ),
            text=clip.TextTransformer(
                vocab_size=2048,
                context_length=16,
                eos_id=2,
                transformer=Transformer(width=width, depth=2, heads=width // 32, mlp=4 * width, scan=False),
            ),
            embedding=128,
        ),
        data=data,
        training=Training(
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=50, weight_decay=0.1, b2=0.98, eps=1e-6),
            steps=steps,
            batch_size=128,
            checkpoint_every=100,
            seed=seed,
        ),
        zero_shot=ZeroShot(name="easy_vqa/shape", prompts=tuple(f"a {color} {{}}" for color in COLORS)),
    )


def captioned(name: str, *mixture: tuple[str, float]) -> Data:
    """Whole drawings or nearly so, for what is cut off is not seen, and captions."""
    fields = (Image(crop_min_area=0.8), Caption())
    return Data(name=name, mixture=mixture, fields=fields, text=Text(vocab_size=2048))


def clip_small() -> Experiment:
    """Emoji and their names, and coloured shapes ("a teal circle"), 64x64: a tower for `llava` to see by.

    A quarter of an hour on two CPU cores. `python -m tools.evaluate runs/clip-small`: 49.9% of the captions of held-out
    emoji find their own first and 69.1% among five; of 944 held-out pictures 98.5% are told circle, rectangle or
    triangle.
    """
    return small(captioned("openmoji", ("easy_vqa/captions", 1.0)))


def clip_small_styles() -> Experiment:
    """`clip-small` with the same emoji as two other artists draw them, Twemoji and Fluent.

    22 minutes on two CPU cores, with tests beside. `python -m tools.evaluate runs/clip-small-styles`: 51.1% of the
    captions of held-out emoji find their own first and 68.9% among five; of 944 held-out pictures 76.4% are told
    circle, rectangle or triangle.

    Needs `emoji_styles/twemoji` and `emoji_styles/fluent_flat`, prepared as TFDS prepares data sets (--data-dir).
    """
    styles = (("emoji_styles/twemoji", 1.0), ("emoji_styles/fluent_flat", 0.85))
    return small(captioned("openmoji", ("easy_vqa/captions", 0.5), *styles), steps=1200)


def judge(width: int, depth: int, seed: int) -> Experiment:
    """What looks at drawings that other models make: it never saw one of OpenMoji's.

    The two styles that it sees are redrawn, for otherwise it tells OpenMoji's outlines from all that it knows.
    """
    data = captioned("emoji_styles/twemoji", ("emoji_styles/fluent_flat", 0.85))
    fields = (Image(redraw=Redraw(smallest=0.6, outlined=0.6, tint=0.35, fade=1.0)), Caption())
    experiment = small(replace(data, fields=fields), width=width, depth=depth, seed=seed)
    return replace(experiment, training=replace(experiment.training, steps=2000, ema_decay=0.99))


def clip_judge_a() -> Experiment:
    """Looks at drawings that other models make: never saw one of OpenMoji's, whose test split shows what it is worth.

    `python -m tools.evaluate runs/clip-judge-a --data.name openmoji`: 14.3% of the captions find their own drawing
    first, 39.2% among ten; in the styles that it sees, of which the test split is new to it, 48.3% and 71.1%. After
    1,200 steps of drawings that are not redrawn it was 1.9%, 15.0%, 54.0% and 72.1%.

    Needs what `clip-small-styles` does.
    """
    return judge(width=128, depth=4, seed=0)


def clip_judge_b() -> Experiment:
    """`clip-judge-a` of another width and seed: what both say is of the drawings, not of one judge.

    11.4% of the captions of OpenMoji's test split find their own drawing first, 42.3% among ten.
    """
    return judge(width=96, depth=6, seed=1)


def published(
    model: clip.Config, *, learning_rate: float, weight_decay: float, b2: float, eps: float, steps: int
) -> Experiment:
    """A published size and schedule, on captioned images that TFDS has prepared."""
    return Experiment(
        model=model,
        data=Data(
            name="coco_captions",
            test="val",
            text=Text(vocab_size=model.text.vocab_size, tokenizer="tokenizer.json"),
        ),
        training=Training(
            optimizer=Optimizer(
                learning_rate=learning_rate, warmup_steps=2000, weight_decay=weight_decay, b2=b2, eps=eps
            ),
            steps=steps,
            batch_size=32768,
            log_every=50,
            checkpoint_every=2000,
        ),
        zero_shot=ZeroShot(name="imagenet2012", split="validation", prompts=imagenet_prompts()),
    )


def clip_vit_b32() -> Experiment:
    """CLIP ViT-B/32 (2103.00020, tables 18 to 20): 151.3M parameters, 32 epochs of 400M pairs, 63.2% on ImageNet.

    Needs CLIP's tokenizer.json (--data.text.tokenizer) and a captioned data set prepared by TFDS (--data.name), and the
    memory of 256 v5e chips with --mesh.fsdp 8, as its larger sisters do: a step takes 2.9 GB of a chip's 15.75.
    """
    return published(clip.CLIP_VIT_B32, learning_rate=5e-4, weight_decay=0.2, b2=0.98, eps=1e-6, steps=390_000)


def clip_vit_b16() -> Experiment:
    """CLIP ViT-B/16 (2103.00020, tables 18 to 20): 149.6M parameters, 68.6% on ImageNet. Needs what B/32 does.

    A step takes 7.2 GB of a v5e chip's 15.75.
    """
    return published(clip.CLIP_VIT_B16, learning_rate=5e-4, weight_decay=0.2, b2=0.98, eps=1e-6, steps=390_000)


def clip_vit_l14() -> Experiment:
    """CLIP ViT-L/14 (2103.00020, tables 18 to 20): 427.6M parameters, 75.3% on ImageNet. Needs what B/32 does.

    A step takes 7.3 GB of a v5e chip's 15.75.
    """
    return published(clip.CLIP_VIT_L14, learning_rate=4e-4, weight_decay=0.2, b2=0.98, eps=1e-6, steps=390_000)


def siglip_vit_b16() -> Experiment:
    """SigLIP ViT-B/16 (2303.15343): 203.2M parameters, the sigmoid loss.

    Needs SigLIP's tokenizer.json (--data.text.tokenizer) and a captioned data set prepared by TFDS (--data.name). With
    --mesh.fsdp 8 on 256 v5e chips a step takes 10.1 GB of a chip's 15.75.
    """
    return published(clip.SIGLIP_VIT_B16, learning_rate=1e-3, weight_decay=1e-4, b2=0.95, eps=1e-8, steps=305_000)


PRESETS = (
    clip_tiny,
    clip_small,
    clip_small_styles,
    clip_judge_a,
    clip_judge_b,
    clip_vit_b32,
    clip_vit_b16,
    clip_vit_l14,
    siglip_vit_b16,
)
