"""Settings of pipelines of latent diffusion: which are read, which refused by their names, and what is not written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from published_pipelines import (
    BLOCKS,
    CLIP,
    CONFIGS,
    ENCODER,
    FIRST,
    READER,
    backbone_of,
    change,
    exported,
    prior_of,
    publish,
    write_arrays,
)
from smallest import LATENTS, STRAIGHT, VQVAE
from vlm_jax.errors import UserError
from vlm_jax.models import text_encoder
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.layout import named, read_params, recognised
from vlm_jax.pretrained.source import open_source

PIPELINES = SD, DIT, PIXART = "stable-diffusion", "dit", "pixart"
VAE, UNET, PART, TEXT = (f"{name}/config.json" for name in ("vae", "unet", "transformer", "text_encoder"))
INDEX, CHAIN = "model_index.json", "scheduler/scheduler_config.json"


ONLY = "which the model cannot express: "
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    (SD, UNET, {"addition_embed_type": "text_time"}, f"addition_embed_type in .* is 'text_time', {ONLY}None is"),
    (SD, UNET, {"class_embed_type": "timestep"}, "class_embed_type in .* is 'timestep'"),
    (SD, UNET, {"num_class_embeds": 10}, "num_class_embeds in .* is 10"),
    (SD, UNET, {"dual_cross_attention": True}, "dual_cross_attention in .* is True"),
    (SD, UNET, {"transformer_layers_per_block": [1, 2, 10]}, r"transformer_layers_per_block in .* is \[1, 2, 10\]"),
    (SD, UNET, {"time_cond_proj_dim": 256}, "time_cond_proj_dim in .* is 256"),
    (SD, UNET, {"flip_sin_to_cos": False}, "flip_sin_to_cos in .* is False"),
    (SD, UNET, {"norm_eps": 1e-6}, "norm_eps in .* is 1e-06"),
    (SD, UNET, {"attention_head_dim": [5, 10, 20]}, r"attention_head_dim in .* is \[5, 10, 20\]: as many heads at"),
    (SD, UNET, {"attention_head_dim": 3}, r"settings of a denoiser .*and of its heads \(3\)"),
    (SD, UNET, {"layers_per_block": [2, 2, 2]}, r"settings of a denoiser .*blocks is \[2, 2, 2\]"),
    (SD, UNET, {"in_channels": 9}, "in_channels in .* is 9: it must be out_channels"),
    (SD, UNET, {"sample_size": [8, 16]}, r"sample_size in .* is \[8, 16\]: it must be a number"),
    (SD, UNET, {"cross_attention_dim": 768}, "cross_attention_dim in .* is 768, and texts have 12 features"),
    (SD, UNET, {"attention_bends": 0.5}, "attention_bends in .* is 0.5, which is not known here"),
    (SD, UNET, {"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types in .* has 'AttnDownBlock2D'"),
    (SD, UNET, {"block_out_channels": [8, 16]}, r"block_out_channels in .* is \[8, 16\], and there are 3"),
    (SD, VAE, {"act_fn": "gelu"}, "act_fn in .*vae/config.json is 'gelu'"),
    (SD, VAE, {"latent_channels": 3}, r"the first stage makes latents float32\[8, 8, 3\] and the prior"),
    (SD, TEXT, {"hidden_act": "silu"}, "hidden_act in .*text_encoder/config.json is 'silu'"),
    (SD, TEXT, {"model_type": "t5"}, "model_type in .* is 't5': give the text tower of a CLIP"),
    (SD, INDEX, {"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet in .* is .*, a part that the model has"),
    (SD, INDEX, {"unet": [None, None]}, "model_index.json has no unet"),
    (SD, CHAIN, {"num_train_timesteps": 100}, f"num_train_timesteps in .* is 100, {ONLY}1000 is"),
    (SD, CHAIN, {"beta_schedule": "sigmoid"}, "beta_schedule in .* is 'sigmoid': there are linear, scaled_linear"),
    (SD, CHAIN, {"beta_end": 0.02}, "beta_end in .* is 0.02: of scaled_linear betas 0.012 can be expressed"),
    (SD, CHAIN, {"prediction_type": "flow"}, "prediction_type in .* is 'flow'"),
    (SD, CHAIN, {"clip_sample": True}, "clip_sample in .* is True"),
    (SD, CHAIN, {"trained_betas": [0.1]}, r"trained_betas in .* is \[0.1\]"),
    (SD, CHAIN, {"rescale_betas_zero_snr": True}, "settings of a denoiser .*zero_terminal"),
    (DIT, PART, {"_class_name": "SD3Transformer2DModel"}, "_class_name in .* is 'SD3Transformer2DModel'"),
    (DIT, PART, {"norm_type": "ada_norm_single"}, "norm_type in .* is 'ada_norm_single'"),
    (DIT, PART, {"norm_eps": 1e-4}, "norm_eps in .* is 0.0001"),
    (DIT, PART, {"attention_bias": False}, "attention_bias in .* is False"),
    (DIT, PART, {"out_channels": 12}, "out_channels in .* is 12: it must be in_channels, 4, or twice that"),
    (DIT, PART, {"num_attention_heads": "2"}, "does not hold the settings of a denoiser"),
    (DIT, INDEX, {"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder in .* a part that the model has"),
    (PIXART, PART, {"use_additional_conditions": True}, "use_additional_conditions in .* is True, of latents of 8"),
    (PIXART, PART, {"interpolation_scale": 2}, "interpolation_scale in .* is 2, of latents of 8"),
    (
        PIXART,
        PART,
        {"sample_size": 128, "use_additional_conditions": None, "interpolation_scale": None},
        "use_additional_conditions in .* is True, of latents of 128",
    ),
    (PIXART, PART, {"caption_channels": 4096}, "caption_channels is 4096 and must be 10"),
    (PIXART, PART, {"cross_attention_dim": 12}, "cross_attention_dim is 12 and must be 8"),
    (PIXART, TEXT, {"feed_forward_proj": "silu"}, "feed_forward_proj in .* is 'silu'"),
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each, to be copied."""
    made = {name: tmp_path_factory.mktemp(name) for name in PIPELINES}
    for name, directory in made.items():
        publish(name, directory)
    return made


def copied(directory: Path, to: Path) -> Path:
    for file in (each for each in directory.rglob("*") if each.is_file()):
        path = to / file.relative_to(directory)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(("name", "file", "told", "words"), REFUSED)
def test_what_cannot_be_expressed_is_refused_by_its_name(
    name: str, file: str, told: dict[str, Any], words: str, directories: dict[str, Path], tmp_path: Path
):
    change(copied(directories[name], tmp_path) / file, **told)
    layout, source = named(LAYOUTS, name), open_source(tmp_path)
    with pytest.raises(UserError, match=words) as refusal:
        read_params(layout, layout.config(source), source.tensors)
    assert "\n" not in str(refusal.value)


def test_a_schedule_of_another_kind_is_refused(directories: dict[str, Path], tmp_path: Path):
    copied(directories[SD], tmp_path)
    (tmp_path / CHAIN).write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    with pytest.raises(UserError, match=r"lacks num_train_timesteps: a chain of noise in steps can be expressed alone"):
        named(LAYOUTS, SD).config(open_source(tmp_path))


def test_a_part_that_is_not_there_or_a_pickle_is_refused(directories: dict[str, Path], tmp_path: Path):
    copied(directories[SD], tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.bin is a pickle, which is not read here"):
        open_source(tmp_path)
    (tmp_path / "unet").rename(tmp_path / "net")
    with pytest.raises(UserError, match=r"lacks unet, a directory: fetch all of the pipeline"):
        named(LAYOUTS, SD).config(open_source(tmp_path))


def test_a_pipeline_of_another_class_is_refused_by_its_class(directories: dict[str, Path], tmp_path: Path):
    change(copied(directories[SD], tmp_path) / INDEX, _class_name="StableDiffusionXLPipeline")
    with pytest.raises(UserError, match=r"no layout .* \(it is a pipeline of class 'StableDiffusionXLPipeline'\)"):
        recognised(open_source(tmp_path), LAYOUTS)
    with pytest.raises(UserError, match=r"_class_name in .* is 'StableDiffusionXLPipeline': the layout is that of a"):
        named(LAYOUTS, SD).config(open_source(tmp_path))


CHAINS: dict[str, dict[str, Any]] = {
    "v": {"predict": "v"},
    "x of a cosine": {"predict": "x", "betas": "cosine"},
    "linear": {"betas": "linear"},
    "to noise alone": {"predict": "v", "zero_terminal": True},
    "most variance": {"variance": "forward"},
}


@pytest.mark.parametrize("changes", CHAINS.values(), ids=CHAINS)
def test_chains_of_noise_go_there_and_back(changes: dict[str, Any], directories: dict[str, Path], tmp_path: Path):
    copied(directories[SD], tmp_path)
    config = prior_of(CONFIGS[SD], **changes)
    (tmp_path / CHAIN).write_text(json.dumps(exported(SD, config)[CHAIN]))
    assert named(LAYOUTS, SD).config(open_source(tmp_path)) == config


def test_settings_of_published_schedulers_are_read(directories: dict[str, Path], tmp_path: Path):
    """Stable Diffusion 1.5's and PixArt's, as they are, of which most says how images are drawn."""
    told = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    told |= {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    copied(directories[SD], tmp_path / SD)
    (tmp_path / SD / CHAIN).write_text(json.dumps(told | {"trained_betas": None, "clip_sample": False}))
    assert named(LAYOUTS, SD).config(open_source(tmp_path / SD)) == CONFIGS[SD]
    told = {"_class_name": "DPMSolverMultistepScheduler", "variance_type": None, "lambda_min_clipped": -np.inf}
    told |= {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    copied(directories[PIXART], tmp_path / PIXART)
    (tmp_path / PIXART / CHAIN).write_text(json.dumps(told | {"thresholding": False, "prediction_type": "epsilon"}))
    assert named(LAYOUTS, PIXART).config(open_source(tmp_path / PIXART)) == CONFIGS[PIXART]


def test_settings_of_the_older_class_are_read(directories: dict[str, Path], tmp_path: Path):
    """As facebook/DiT-XL-2-256 and PixArt-alpha/PixArt-XL-2-512x512 have them."""
    older = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "only_cross_attention": False}
    older |= {"norm_num_groups": 32, "upcast_attention": False, "use_linear_projection": False, "dropout": 0.0}
    for name, more in ((DIT, {"norm_eps": 1e-5}), (PIXART, {"double_self_attention": False})):
        path = copied(directories[name], tmp_path / name)
        change(path / PART, **older, **more)
        told = json.loads((path / PART).read_text())
        told = {
            key: value for key, value in told.items() if key not in ("interpolation_scale", "use_additional_conditions")
        }
        (path / PART).write_text(json.dumps(told))
        assert named(LAYOUTS, name).config(open_source(path)) == CONFIGS[name]


def test_a_first_stage_is_of_the_images_of_the_latents(directories: dict[str, Path], tmp_path: Path):
    """Whatever size it was trained at: PixArt's is that of 256 pixels at 512, too."""
    change(copied(directories[SD], tmp_path) / VAE, sample_size=512)
    assert named(LAYOUTS, SD).config(open_source(tmp_path)).first == FIRST


OTHERS: list[tuple[str, Callable[[Any], Any], str]] = [
    (SD, lambda c: replace(c, first=VQVAE), "first is of vlm_jax.models.vqvae and a pipeline's first stage is"),
    (SD, lambda c: replace(c, prior=replace(STRAIGHT, **LATENTS)), "prior is 'vlm_jax.models.probability_flow'"),
    (SD, lambda c: CONFIGS[DIT], "prior.network.backbone is 'DiT' and StableDiffusionPipeline's"),
    (SD, lambda c: prior_of(c, timesteps=100), "prior.timesteps is 100 and diffusers's layouts have 1000 alone"),
    (SD, lambda c: prior_of(c, variance="learned"), "prior.variance is learned"),
    (SD, lambda c: prior_of(c, text=None), "prior.text.network is 'NoneType'"),
    (SD, lambda c: prior_of(c, text=text_encoder.Config(network=ENCODER)), "prior.text.network is 'T5'"),
    (
        SD,
        lambda c: prior_of(c, text=text_encoder.Config(network=replace(CLIP, pool="last"))),
        "network.pool is 'last'",
    ),
    (DIT, lambda c: prior_of(c, network=replace(c.prior.network, classes=None)), "prior.network.classes is None"),
    (DIT, lambda c: backbone_of(c, transformer=replace(BLOCKS, mlp=20)), "backbone.transformer.mlp is 20"),
    (DIT, lambda c: backbone_of(c, transformer=replace(BLOCKS, norm_eps=1e-5)), "transformer.norm_eps is 1e-05"),
    (DIT, lambda c: backbone_of(c, transformer=replace(BLOCKS, activation="gelu")), "transformer.activation is 'gelu'"),
    (PIXART, lambda c: CONFIGS[DIT], "prior.network.backbone is 'DiT' and PixArtAlphaPipeline's layouts have 'PixArt'"),
    (
        PIXART,
        lambda c: prior_of(c, text=text_encoder.Config(network=replace(ENCODER, context_length=64))),
        "prior.text.network.context_length is 64 and PixArtAlphaPipeline's layouts have 120",
    ),
    ("dit-original", lambda c: replace(c, levels=256, channels=3), "levels is 256"),
    ("dit-original", lambda c: replace(c, variance="posterior"), "variance is 'posterior'"),
    ("dit-original", lambda c: replace(c, betas="cosine"), "betas is 'cosine'"),
    ("dit-original", lambda c: prior_of(CONFIGS[DIT]).prior, "network.backbone.transformer.heads is 2"),
    ("dit-original", lambda c: CONFIGS[SD].prior, "network.backbone is 'LatentUNet'"),
]


@pytest.mark.parametrize(("name", "other", "words"), OTHERS)
def test_what_a_layout_cannot_express_is_not_written(name: str, other: Callable[[Any], Any], words: str):
    with pytest.raises(UserError, match=words) as refusal:
        exported(name, other(CONFIGS[name]))
    assert "\n" not in str(refusal.value)


def test_a_dit_that_learns_no_variance_has_half_the_channels(tmp_path: Path):
    """The most that a step can have in the authors' file, the least in a pipeline of DDIM."""
    for name, variance in (("dit", "posterior"), ("dit-original", "forward")):
        config = CONFIGS[name]
        config = replace(config, variance=variance) if name == "dit-original" else prior_of(config, variance=variance)
        publish(name, tmp_path / name, config)
        assert named(LAYOUTS, name).config(open_source(tmp_path / name)) == config


def test_a_width_that_the_authors_have_not_has_unknown_heads(tmp_path: Path):
    _, arrays = publish("dit-original", tmp_path)
    wide = {key: np.zeros((400, *x.shape[1:]), x.dtype) if key.startswith("x_emb") else x for key, x in arrays.items()}
    write_arrays("dit-original", tmp_path, wide)
    with pytest.raises(UserError, match=r"is of width 400, and the authors' are 384, 768, 1024, 1152"):
        named(LAYOUTS, "dit-original").config(open_source(tmp_path))


def test_texts_of_another_length_than_the_tower_reads_are_refused(directories: dict[str, Path], tmp_path: Path):
    copied(directories[SD], tmp_path)
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    change(settings, model_max_length=77)
    with pytest.raises(UserError, match=r"model_max_length in .* is 77, and the text encoder reads 12 tokens"):
        named(LAYOUTS, SD).tokenizer(open_source(tmp_path))
    change(settings, model_max_length=12)
    found = named(LAYOUTS, SD).tokenizer(open_source(tmp_path))
    assert found is not None and found.same(READER)


def test_a_directory_without_a_tokenizer_that_can_be_read_says_how_one_is_made(
    directories: dict[str, Path], tmp_path: Path
):
    copied(directories[PIXART], tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer" / "spiece.model")
    with pytest.raises(UserError, match=r"has neither a tokenizer.json nor .* run python -c \"from transformers"):
        named(LAYOUTS, PIXART).tokenizer(open_source(tmp_path))


def test_pixart_reads_captions_in_small_letters(directories: dict[str, Path], tmp_path: Path):
    """As its pipeline has them, and as often as it is read and written."""
    source, layout = open_source(directories[PIXART]), named(LAYOUTS, PIXART)
    first = layout.tokenizer(source)
    assert first is not None
    tokens = first.encode(["  The RED circle "], 12)
    np.testing.assert_array_equal(tokens, READER.encode(["the red circle"], 12))
    copied(directories[PIXART], tmp_path)
    first.save(tmp_path / "tokenizer" / "tokenizer.json")
    again = layout.tokenizer(open_source(tmp_path))
    assert again is not None and again.same(first)
