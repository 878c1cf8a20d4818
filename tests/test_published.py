"""The published sizes are those of the papers and released checkpoints, and their steps lower on eight devices."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from experiments.presets import presets
from tools.compile_report import lower_step
from vlm_jax.contract import Model, abstract_batch
from vlm_jax.data import Image
from vlm_jax.experiment import Experiment
from vlm_jax.models import build, clip, llava
from vlm_jax.nn.autoencoder import Pyramid
from vlm_jax.nn.unet import Sizes
from vlm_jax.sharding import MeshShape, make_mesh, placed
from vlm_jax.start import check_configs
from vlm_jax.trees import count_parameters, partition

PRESETS = {name: experiment for name, (_, experiment) in presets().items()}
OURS = r"tradeoff|tiny|small|judge|fashion-mnist|llava-smollm2"
"""Presets of sizes that nobody published."""
PUBLISHED = {name: experiment for name, experiment in PRESETS.items() if not re.search(OURS, name)}
CLIP = [name for name in PUBLISHED if re.match(r"clip|siglip", name)]
KEY = jax.random.key(0)


def vdm_parameters(width: int, blocks: int) -> int:
    """Of a U-Net that keeps its resolution, for RGB images with two Fourier features, and of the learned schedule."""
    condition = 4 * width

    def block(inputs: int) -> int:
        norms = 2 * inputs + 2 * width
        convolutions = 9 * width * (inputs + width) + 2 * width
        skip = inputs * width + width if inputs != width else 0
        return norms + convolutions + (condition + 1) * width + skip

    time = (width + 1) * condition + (condition + 1) * condition
    ends = 9 * 15 * width + width + 2 * width + 9 * width * 3 + 3
    attention = 2 * width + 4 * (width + 1) * width
    schedule = 2 + 1 + 3 * 1024  # ends, line, sigmoids
    return time + ends + attention + (blocks + 2) * block(width) + (blocks + 1) * block(2 * width) + schedule


def pixelcnn_parameters(width: int, depth: int, kernel: int) -> int:
    """Of a Gated PixelCNN with a mixture of ten logistics for RGB: a weight, and for each channel three numbers."""
    vertical, horizontal = kernel * (kernel // 2 + 1), kernel // 2 + 1
    layer = (vertical + horizontal + 2) * width * 2 * width + 4 * width + (width + 1) * width
    head = 2 * width + (width + 1) * width + (width + 1) * 10 * (1 + 3 * 3)
    return 3 * 256 * width + depth * layer + head


def vdvae_parameters(width: int, hidden: int, latent: int, encoder: dict[int, int], decoder: dict[int, int]) -> int:
    """Blocks by the height of their resolution; of a mixture of ten logistics for RGB."""

    def bottleneck(size: int, inputs: int, outputs: int) -> int:
        window = 9 if size > 2 else 1
        return (inputs + 1) * hidden + 2 * (window * hidden + 1) * hidden + (hidden + 1) * outputs

    def block(size: int) -> int:
        prior, posterior = bottleneck(size, width, 2 * latent + width), bottleneck(size, 2 * width, 2 * latent)
        return prior + posterior + (latent + 1) * width + bottleneck(size, width, width)

    ends = (9 * 3 + 1) * width + 2 * width + (width + 1) * 100
    seen = sum(count * bottleneck(size, width, width) for size, count in encoder.items())
    return ends + seen + sum(count * block(size) + size**2 * width for size, count in decoder.items())


def glow_parameters(steps: int, channels: tuple[int, ...], width: int = 512) -> int:
    """Layer by layer, at resolutions of so many channels."""

    def step(c: int) -> int:
        network = 9 * (c // 2) * width + width * width + 4 * width + (9 * width + 1) * c
        return 2 * c + (2 * c * c + c) + network

    splits = sum(9 * (c // 2) * c + c for c in channels[:-1])
    return steps * sum(map(step, channels)) + splits + 2 * channels[-1]


def tarflow_parameters(patch: int, width: int, blocks: int, depth: int, image_size: int = 64) -> int:
    """Of RGB images: [P, Ch, T, K] as the paper writes a size, with a norm after each block's layers."""
    size, length = 3 * patch**2, (image_size // patch) ** 2
    layer = 4 * (width + 1) * width + (width + 1) * 4 * width + (4 * width + 1) * width + 4 * width
    return blocks * ((size + 1) * width + length * width + depth * layer + 2 * width + (width + 1) * 2 * size)


def critic_parameters(widths: tuple[int, ...]) -> int:
    """Of the critic of patches of 1611.07004: 4x4 windows, biases first and last, and norms between."""
    ends = 16 * 3 * widths[0] + widths[0] + 16 * widths[-1] + 1
    return ends + sum(16 * inputs * width + 2 * width for inputs, width in pairwise(widths))


SD_VAE = 83_653_863


def llamagen_parameters(width: int, depth: int) -> int:
    """Of a Llama of 16,384 codes, which are read and predicted by tables of their own, and 1,000 classes and none."""
    mlp = 256 * math.ceil(8 * width / 3 / 256)
    return depth * (4 * width**2 + 3 * width * mlp + 2 * width) + width + 2 * 16_384 * width + 1_001 * width


def chameleon_parameters(width: int, depth: int, heads: int, kv_heads: int, mlp: int) -> int:
    """Of 65,536 tokens, which are read and predicted by tables of their own, with a norm of each head's queries and
    keys, of 128 features; layer by layer. The tokenizer's are those of `vqgan-f16` with its 8,192 codes."""
    attention = 2 * width**2 + 2 * width * kv_heads * 128 + 2 * (heads + kv_heads) * 128
    return depth * (attention + 3 * width * mlp + 2 * width) + width + 2 * 65_536 * width + 68_718_467


def transfusion_parameters(width: int, depth: int, mlp: int, *, image_mlps: int = 0) -> int:
    """Of a Llama of 32,000 tokens and two that stand around images; perhaps with further feed-forward layers."""
    layer = 4 * width**2 + 2 * width + 3 * width * mlp + image_mlps * (3 * width * mlp + width)
    return depth * layer + width + 2 * 32_002 * width


def linear_patches(width: int, patch: int, *, bottleneck: int | None = None) -> int:
    """In, with a time of 256 features that is added to the patch, and out."""
    time = (256 + 1) * patch + (patch + 1) * patch
    into = (patch + 1) * width if bottleneck is None else patch * bottleneck + (bottleneck + 1) * width
    return time + into + (width + 1) * patch


def unet_patches(width: int, channels: int, wide: tuple[int, int]) -> int:
    """Two blocks at each of two resolutions on the way in, three on the way out, which see all that the way in has."""
    one, two = wide
    condition = 4 * one

    def block(inputs: int, outputs: int) -> int:
        skip = 0 if inputs == outputs else (inputs + 1) * outputs
        convolutions = 9 * outputs * (inputs + outputs) + 2 * outputs
        return 2 * inputs + 2 * outputs + convolutions + (condition + 1) * outputs + skip

    time = (256 + 1) * condition + (condition + 1) * condition
    into = (9 * channels + 1) * one + 2 * block(one, one) + (9 * one + 1) * one + block(one, two) + block(two, two)
    back = 2 * block(2 * two, two) + block(two + one, two) + (9 * two + 1) * two
    back += block(two + one, one) + 2 * block(2 * one, one) + 2 * one + (9 * one + 1) * channels
    return time + into + (two + 1) * width + (width + 1) * two + back


LATENTS_OF_8 = 83_653_863 + (9 * 512 + 1) * 8 + (16**2 + 16 - 8**2 - 8) + (8**2 + 8 - 4**2 - 4) + 9 * 4 * 512
"""Of Stable Diffusion's first stage, with twice the channels."""
LOOK = 85_799_424 + (257 - 197) * 768 + critic_parameters((64, 128, 256, 512))
"""Who looks at copies of 256 pixels: the image tower of OpenAI's CLIP ViT-B/16, which has more patches here, and a
critic."""

PARAMETERS = {
    # Of OpenAI's released checkpoints, each with its logit_scale.
    "clip-vit-b32": 151_277_313,
    "clip-vit-b16": 149_620_737,
    "clip-vit-l14": 427_616_513,
    # Of google/siglip-base-patch16-224, with its logit_scale and logit_bias.
    "siglip-vit-b16": 203_155_970,
    # 76M in the paper, whose table of colours and head are of another size, and which has no masked convolution.
    "autoregressive-igpt-s": 76_399_716 + 4 * 512**2,
    # Of the releases; the tables of Llama 3.2 and Qwen2.5 are read and predicted by.
    "language-llama2-7b": 6_738_415_616,
    "language-llama3-2-1b": 1_235_814_400,
    "language-qwen2-5-0-5b": 494_032_768,
    # Of llava-hf/llava-1.5-7b-hf and 13b-hf, whose vocabulary has 64 tokens more than Vicuna's.
    **dict.fromkeys(("llava-v1-5-7b-projector", "llava-v1-5-7b"), 7_063_427_072),
    **dict.fromkeys(("llava-v1-5-13b-projector", "llava-v1-5-13b"), 13_350_839_296 + 2 * 64 * 5120),
    # 39 million, counted layer by layer.
    "ladder-vae-cifar10": vdvae_parameters(
        384, 96, 16, encoder={32: 12, 16: 7, 8: 7, 4: 4, 1: 3}, decoder={32: 22, 16: 11, 8: 6, 4: 3, 1: 1}
    ),
    # No number is published: of the layers of 1606.05328, figure 2, counted layer by layer.
    "pixelcnn-cifar10": pixelcnn_parameters(width=384, depth=20, kernel=5),
    # 35.7 million: of google/ddpm-cifar10-32.
    "diffusion-ddpm-cifar10": 35_746_307,
    # No number is published: of the layers that 2107.00630, appendix B, describes, counted layer by layer.
    "diffusion-vdm-cifar10": vdm_parameters(width=128, blocks=32),
    # 33, 130, 458 and 675 million: of the release, less the 256 positions that it stores.
    "dit-s2": 32_963_360 - 256 * 384 + SD_VAE,
    "dit-b2": 130_512_416 - 256 * 768 + SD_VAE,
    "dit-l2": 458_102_816 - 256 * 1024 + SD_VAE,
    "dit-xl2": 675_129_632 - 256 * 1152 + SD_VAE,
    # Of the release's U-Net, and of CLIP's text tower as transformers has it alone.
    "sd15": 859_520_964 + 123_060_480 + 77 * 768 + SD_VAE,
    # 0.6 billion: of diffusers' PixArtTransformer2DModel on PyTorch's meta device; and of T5 v1.1 XXL's encoder.
    "pixart-xl2": 610_856_096 + 4_762_310_656 + 120 * 4096 + SD_VAE,
    # 111, 343 and 775 million: counted layer by layer; and the tokenizer.
    "llamagen-b": llamagen_parameters(768, 12) + 71_883_403,
    "llamagen-l": llamagen_parameters(1024, 24) + 71_883_403,
    "llamagen-xl": llamagen_parameters(1280, 36) + 71_883_403,
    "chameleon-7b": chameleon_parameters(4096, 32, 32, 32, 11_008),
    "transfusion-160m": transfusion_parameters(768, 16, 2048) + linear_patches(768, 32) + LATENTS_OF_8,
    "transfusion-760m": transfusion_parameters(1536, 24, 4096) + linear_patches(1536, 32) + LATENTS_OF_8,
    "transfusion-7b": transfusion_parameters(4096, 32, 11_008) + unet_patches(4096, 8, (640, 1280)) + LATENTS_OF_8,
    "pixel-transfusion-760m": (
        transfusion_parameters(1536, 24, 4096, image_mlps=1)
        + linear_patches(1536, 768, bottleneck=128)
        + 2 * (9 * 3 * 32 + 32 + 9 * 32 * 3 + 3)
    ),
    "chameleon-34b": chameleon_parameters(8192, 48, 64, 8, 22_016),
    # Of diffusers' AutoencoderKL and VQModel of these settings, on PyTorch's meta device; f8 is Stable Diffusion's.
    "autoencoder-kl-f4": 55_312_063 + LOOK,
    "autoencoder-kl-f8": 83_653_863 + LOOK,
    "autoencoder-kl-f16": 69_610_963 + LOOK,
    "vqgan-f16": 72_141_699 + LOOK,
    "vqgan-f16-16384": 76_073_859 + LOOK - critic_parameters((64, 128, 256, 512)) + critic_parameters((64, 128, 256)),
    "llamagen-tokenizer-f16": 71_883_403 + LOOK,
    "llamagen-tokenizer-f8": 70_109_835 + LOOK,
    # Likewise, less the codes, which are averages, and with three scales of pixels.
    "vqvae-imagenet": 15_077_507 - 512 * 64 + 3,
    # Of the layers that 1807.03039 describes; no exact number is published.
    "flow-glow-cifar10": glow_parameters(32, (12, 24, 48)),
    "flow-glow-imagenet64": glow_parameters(48, (12, 24, 48, 96)),
    # [2, 768, 8, 8] of 2412.06329, table 2; its layers counted.
    "tarflow-imagenet64": tarflow_parameters(2, 768, 8, 8),
    "tarflow-imagenet64-class": tarflow_parameters(2, 768, 8, 8) + 8 * 1000 * 768,
}


def abstract_variables(model: Model) -> Any:
    return jax.eval_shape(model.init, KEY, abstract_batch(model.inputs, 2))


def test_every_published_preset_is_covered():
    assert PARAMETERS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_that_of_the_release(name: str):
    assert count_parameters(abstract_variables(build(PUBLISHED[name].model))["params"]) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "learning_rate", "b2", "clip_norm", "batch_size", "steps", "ema_decay", "flip"),
    [
        ("diffusion-ddpm-cifar10", 2e-4, 0.999, 1.0, 128, 800_000, 0.9999, True),
        ("diffusion-vdm-cifar10", 2e-4, 0.99, None, 128, 10_000_000, 0.9999, False),
        ("dit-s2", 1e-4, 0.999, None, 256, 400_000, 0.9999, False),
        ("dit-xl2", 1e-4, 0.999, None, 256, 7_000_000, 0.9999, False),
        ("ladder-vae-cifar10", 2e-4, 0.9, 200 / math.log(2), 32, 1_100_000, 0.9999, False),
    ],
)
def test_generative_models_are_trained_as_published(
    name: str,
    learning_rate: float,
    b2: float,
    clip_norm: float | None,
    batch_size: int,
    steps: int,
    ema_decay: float,
    flip: bool,
):
    """2006.11239, appendix B; 2107.00630, appendix B; 2212.09748, section 4; VDVAE's release, whose loss is in nats."""
    experiment = PUBLISHED[name]
    training, optimizer = experiment.training, experiment.training.optimizer
    assert (optimizer.learning_rate, optimizer.b2, optimizer.clip_norm) == (learning_rate, b2, clip_norm)
    assert (training.batch_size, training.steps, training.ema_decay) == (batch_size, steps, ema_decay)
    assert any(isinstance(field, Image) and field.flip for field in experiment.data.fields) == flip


@pytest.mark.parametrize(
    ("name", "rate", "betas", "clip_norm", "batch_size", "steps", "critic"),
    [
        ("autoencoder-kl-f4", 1.08e-4, (0.5, 0.9), None, 24, 176_991, (0.5, 50_001)),
        ("autoencoder-kl-f8", 1.08e-4, (0.5, 0.9), None, 24, 246_803, (0.5, 50_001)),
        ("autoencoder-kl-f16", 1.08e-4, (0.5, 0.9), None, 24, 442_998, (0.5, 50_001)),
        ("vqgan-f16", 5.4e-5, (0.5, 0.9), None, 12, 500_000, (0.8, 250_001)),
        ("vqgan-f16-16384", 5.4e-5, (0.5, 0.9), None, 12, 500_000, (0.75, 0)),
        ("llamagen-tokenizer-f16", 1e-4, (0.9, 0.95), 1.0, 128, 40 * 10_009, (0.5, 20_000)),
        ("llamagen-tokenizer-f8", 1e-4, (0.9, 0.95), 1.0, 128, 40 * 10_009, (0.5, 20_000)),
    ],
)
def test_first_stages_are_trained_as_published(
    name: str,
    rate: float,
    betas: tuple[float, float],
    clip_norm: float | None,
    batch_size: int,
    steps: int,
    critic: tuple[float, int],
):
    """CompVis's configs for 2112.10752 and 2012.09841, with the rate that their main.py makes of them for one GPU;
    LlamaGen's vq_train.py. The judge is frozen, and all of it is taken from another run."""
    experiment = PUBLISHED[name]
    training, optimizer, goal = experiment.training, experiment.training.optimizer, experiment.model.objective
    assert optimizer.learning_rate == pytest.approx(rate) and optimizer.schedule == "constant"
    assert ((optimizer.b1, optimizer.b2), optimizer.clip_norm, optimizer.weight_decay) == (betas, clip_norm, 0.0)
    assert (training.batch_size, training.steps) == (batch_size, steps)
    assert ((goal.adversarial, goal.start), goal.judged, goal.kl_weight) == (critic, 1.0, 1e-6)
    frozen, _ = partition(abstract_variables(build(experiment.model))["params"], experiment.frozen)
    assert frozen.keys() == {"objective"} and frozen["objective"].keys() == {"judge"}
    judge = replace(clip.CLIP_VIT_B16.image, mean=clip.OPENAI_MEAN, std=clip.OPENAI_STD)
    source = replace(clip.CLIP_VIT_B16, image=judge)
    check_configs(experiment.start[0], source, experiment.model)


def test_published_samples_are_drawn_as_those_that_were_scored():
    """2212.09748, table 4: all but the largest without guidance; 2006.11239: with the variance of the forward step.

    ml-tarflow, README: guidance of 2.3, rising, of a model of images with noise of 0.05, told nine classes of ten.
    """
    flow = PUBLISHED["tarflow-imagenet64-class"]
    assert (flow.sampling.guidance, flow.sampling.rising, flow.sampling.attention_temperature) == (2.3, True, 1.0)
    assert (flow.model.noise, flow.model.class_dropout, flow.model.classes) == (0.05, 0.1, 1000)
    guidance = {size: PUBLISHED[f"dit-{size}"].sampling.guidance for size in ("s2", "b2", "l2", "xl2")}
    assert guidance == {"s2": 1.0, "b2": 1.0, "l2": 1.0, "xl2": 1.5}
    ddpm = PUBLISHED["diffusion-ddpm-cifar10"]
    assert ddpm.model.variance == "forward"
    assert (ddpm.sampling.solver, ddpm.sampling.steps) == ("ancestral", 1000)


@pytest.mark.parametrize(
    ("name", "patch", "image", "text", "embedding"),
    [
        ("clip-vit-b32", 32, (768, 12, 12), (512, 12, 8), 512),
        ("clip-vit-b16", 16, (768, 12, 12), (512, 12, 8), 512),
        ("clip-vit-l14", 14, (1024, 24, 16), (768, 12, 12), 768),
        ("siglip-vit-b16", 16, (768, 12, 12), (768, 12, 12), 768),
    ],
)
def test_towers_have_the_published_sizes(
    name: str, patch: int, image: tuple[int, int, int], text: tuple[int, int, int], embedding: int
):
    """Width, depth and heads: 2103.00020, table 20, and 2303.15343, section 4."""
    model: clip.Config = PUBLISHED[name].model
    assert (model.image.image_size, model.image.patch_size, model.image.channels) == (224, patch, 3)
    for tower, (width, depth, heads) in ((model.image.transformer, image), (model.text.transformer, text)):
        assert (tower.width, tower.depth, tower.heads, tower.mlp) == (width, depth, heads, 4 * width)
        assert tower.dtype == "bfloat16" and tower.scan
        assert tower.remat == ("all" if name == "clip-vit-l14" else "products")  # or the batch does not fit its pod
    assert model.embedding == embedding


@pytest.mark.parametrize("name", CLIP)
def test_texts_norms_and_temperatures_are_the_published_ones(name: str):
    model: clip.Config = PUBLISHED[name].model
    text = model.text
    if name.startswith("clip"):
        assert (text.vocab_size, text.context_length, text.eos_id, text.pool) == (49408, 77, 49407, "eos")
        assert (model.objective, model.projection, model.image.pool) == ("info_nce", True, "class")
        assert model.image.pre_norm and not model.image.patch_bias
        activation, epsilon, scale = "quick_gelu", 1e-5, 1 / 0.07
    else:
        assert (text.vocab_size, text.context_length, text.pool) == (32000, 64, "last")
        assert (model.objective, model.projection, model.image.pool) == ("sigmoid", False, "attention")
        assert model.image.patch_bias and not model.image.pre_norm
        activation, epsilon, scale = "gelu_tanh", 1e-6, 10.0
    for tower in (model.image.transformer, text.transformer):
        assert (tower.activation, tower.norm_eps) == (activation, epsilon)
    # XLA drops all that a scalar does not depend on: nothing of the model's size is computed or held.
    params = jax.jit(lambda key: scalars(build(model), key))(KEY)
    assert params["log_scale"] == pytest.approx(math.log(scale), rel=1e-6)
    assert params.get("logit_bias") == (None if name.startswith("clip") else -10)


def scalars(model: Model, key: jax.Array) -> dict[str, jax.Array]:
    batch = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract_batch(model.inputs, 1).items()}
    return {name: leaf for name, leaf in model.init(key, batch)["params"].items() if name.startswith("log")}


@pytest.mark.parametrize(
    ("name", "learning_rate", "b2", "eps", "weight_decay"),
    [
        ("clip-vit-b32", 5e-4, 0.98, 1e-6, 0.2),
        ("clip-vit-b16", 5e-4, 0.98, 1e-6, 0.2),
        ("clip-vit-l14", 4e-4, 0.98, 1e-6, 0.2),
        ("siglip-vit-b16", 1e-3, 0.95, 1e-8, 1e-4),
    ],
)
def test_the_schedule_is_the_published_one(name: str, learning_rate: float, b2: float, eps: float, weight_decay: float):
    """2103.00020, tables 18 and 19; 2303.15343, section 4."""
    experiment = PUBLISHED[name]
    optimizer = experiment.training.optimizer
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2) == (learning_rate, 0.9, b2)
    assert (optimizer.eps, optimizer.weight_decay, optimizer.schedule) == (eps, weight_decay, "cosine")
    assert (optimizer.warmup_steps, experiment.training.batch_size) == (2000, 32768)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_llava_is_trained_in_the_published_stages(size: str):
    """2310.03744, appendix A; what does not train is kept in half the bits."""
    first, second = PUBLISHED[f"llava-v1-5-{size}-projector"], PUBLISHED[f"llava-v1-5-{size}"]
    assert first.model == second.model and first.model.image_tokens == 576
    rates = [(each.training.optimizer.learning_rate, each.training.batch_size) for each in (first, second)]
    assert rates == [(1e-3, 256), (2e-5, 128)]
    for experiment, trains in ((first, {"projector"}), (second, {"projector", "language"})):
        training, optimizer = experiment.training, experiment.training.optimizer
        assert (optimizer.weight_decay, optimizer.schedule) == (0.0, "cosine")
        assert optimizer.warmup_steps == round(0.03 * training.steps)
        frozen, live = partition(abstract_variables(build(experiment.model))["params"], experiment.frozen)
        assert live.keys() == trains and frozen.keys() == {"vision", "language"} - trains
        assert experiment.frozen_dtype == "bfloat16"


def lowered_step(experiment: Experiment) -> jax.stages.Lowered:
    """The sharded train step of the published batch, without a single array."""
    tensor = 1 if isinstance(experiment.model, llava.Config) and experiment.model.language.decoder.heads % 2 else 2
    return lower_step(experiment, make_mesh(MeshShape(data=2, fsdp=4 // tensor, tensor=tensor)))[1]


SCANNED = ("clip-vit-b16", "dit-xl2", "llava-v1-5-7b-projector", "llava-v1-5-7b")  # traced within seconds


@pytest.mark.parametrize(
    "name", [*SCANNED, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name not in SCANNED)]
)
def test_the_sharded_step_lowers(name: str):
    assert "mhlo.num_partitions = 8" in lowered_step(PUBLISHED[name]).as_text()


@pytest.fixture
def uncached() -> Iterator[None]:
    """Every program is compiled: one that is read from the cache comes without the compiler's warnings."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


SIZES = (
    r"^(sd15|dit-(s2|b2|l2)|llamagen-(l|xl)|vqgan-f16-16384|llamagen-tokenizer-f8|autoencoder-kl-(f4|f16)|.*-13b.*)$"
)
"""Presets that another one is like in all but sizes, and of a network that takes a minute and more to compile."""


def shallow(config: Any) -> Any:
    """The same with one block where a U-Net or an autoencoder has several alike, which compile one by one."""
    if not is_dataclass(config):
        return config
    found = {field.name: shallow(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Sizes | Pyramid):
        found |= {"blocks": 1}
    return replace(config, **found)


WHOLE_ON_EVERY_DEVICE = "Involuntary full rematerialization"
"""The partitioner's warning that it copies an activation of the whole batch to every device, and splits it there."""


@pytest.mark.slow
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("name", [name for name in PRESETS if not re.match(SIZES, name)])
def test_no_activation_of_the_whole_batch_goes_to_every_device(name: str, capfd: pytest.CaptureFixture[str]):
    preset = PRESETS[name]
    lowered_step(replace(preset, model=shallow(preset.model))).compile()
    assert WHOLE_ON_EVERY_DEVICE not in capfd.readouterr().err


@pytest.mark.usefixtures("uncached")
def test_the_partitioner_still_warns_where_every_device_gets_the_whole(capfd: pytest.CaptureFixture[str]):
    """Which the test above exists to find: of a change of layout that no release so far makes piece by piece."""
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    before, after = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec("fsdp"), PartitionSpec(None, ("data", "fsdp")))
    )
    x = placed(jax.ShapeDtypeStruct((8, 16), "float32"), before)
    compiled = jax.jit(jnp.sin, out_shardings=after).lower(x).compile()
    assert "f32[8,16]" in compiled.as_text()
    assert WHOLE_ON_EVERY_DEVICE in capfd.readouterr().err
