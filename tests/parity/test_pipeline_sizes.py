"""Networks of published sizes have the arrays that diffusers' have; CLIP's tokenizer is read as by transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTokenizer

from diffusers_pipelines import clip_tokens
from vlm_jax.models import autoencoder, diffusion, latent_diffusion, text_encoder
from vlm_jax.nn.denoiser import Network
from vlm_jax.nn.dit import DiT
from vlm_jax.nn.pixart import PixArt
from vlm_jax.nn.text import TextTransformer
from vlm_jax.nn.transformer import Transformer
from vlm_jax.nn.unet import SD15
from vlm_jax.pretrained import LAYOUTS
from vlm_jax.pretrained.clip_tokenizer import read_clip_tokenizer
from vlm_jax.pretrained.layout import abstract_params, named, written_keys

TOWER = Transformer(width=768, depth=12, heads=12, mlp=3072, activation="quick_gelu", norm_eps=1e-5)
CLIP = TextTransformer(vocab_size=49_408, context_length=77, eos_id=49_407, transformer=TOWER)
XL = Transformer(width=1152, depth=28, heads=16, mlp=4608)
XXL = text_encoder.Config(network=replace(text_encoder.T5_V1_1_XXL, context_length=120))


class Size(NamedTuple):
    """A published one."""

    theirs: Callable[[], Any]
    side: int
    network: Network
    text: Any
    parameters: int
    arrays: int


SIZES = {
    "stable-diffusion": Size(
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        64,
        Network(backbone=SD15),
        text_encoder.Config(network=CLIP),
        859_520_964,
        686,
    ),
    # The authors' 675,129,632 with their table of 294,912 positions; and 27 copies of 2,777,472.
    "dit": Size(
        lambda: DiTTransformer2DModel(out_channels=8),
        32,
        Network(backbone=DiT(patch_size=2, transformer=XL), classes=1000),
        None,
        675_129_632 - 294_912 + 27 * 2_777_472,
        538,
    ),
    "pixart": Size(
        lambda: PixArtTransformer2DModel(sample_size=64, caption_channels=4096),
        64,
        Network(backbone=PixArt(patch_size=2, transformer=XL)),
        XXL,
        610_856_096,
        603,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_networks_of_published_sizes_have_the_same_arrays(name: str):
    """None is made here, on either side: Stable Diffusion 1.5, DiT-XL/2 and PixArt-XL/2."""
    size = SIZES[name]
    with torch.device("meta"):
        state = size.theirs().state_dict()
    assert (sum(x.numel() for x in state.values()), len(state)) == (size.parameters, size.arrays)
    variance = "posterior" if name == "stable-diffusion" else "learned"
    latents: Any = {"image_size": size.side, "channels": 4, "levels": None}
    prior = diffusion.Config(**latents, network=size.network, text=size.text, variance=variance)
    config = latent_diffusion.Config(first=replace(autoencoder.SD_VAE, image_size=8 * size.side), prior=prior)
    layout = named(LAYOUTS, name)
    params = {**abstract_params(config)}
    params["prior"] = {key: tree for key, tree in params["prior"].items() if key != "untold"}
    place = "unet/" if name == "stable-diffusion" else "transformer/"
    sizes = {key: size for key, size in written_keys(layout, config, params).items() if key.startswith(place)}
    assert sizes == {place + key: 4 * x.numel() for key, x in state.items()}


def test_clip_s_vocabulary_and_merges_are_read_as_transformers_reads_them(tmp_path: Path):
    vocabulary, merges = clip_tokens()
    CLIPTokenizer(vocab=vocabulary, merges=merges)._tokenizer.model.save(str(tmp_path))
    found = read_clip_tokenizer(tmp_path)
    assert found is not None and found.vocab_size == len(vocabulary)
    theirs = CLIPTokenizer(vocab=vocabulary, merges=merges)
    texts = ["A red circle", "two  RED circles, and a blue one which is too long to be read whole", ""]
    texts += ["it's RED12 re!!", "née", "\tcir\n\ncircé ...?!", "日本 🙂"]
    for text in texts:
        expected = theirs(text, padding="max_length", truncation=True, max_length=20).input_ids
        assert found.encode([text], 20)[0].tolist() == expected, text
