"""Small pipelines of diffusers, of random weights none of which is where it starts."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from converted import TOKENIZER

SIDE, CLASSES, LENGTH = 8, 1000, 16
FAINT = 0.01
"""Of the first layer's kernel: features that are hardly there, of which a norm's epsilon is a part that one sees."""
PIPELINES = {
    "stable-diffusion": diffusers.StableDiffusionPipeline,
    "dit": diffusers.DiTPipeline,
    "pixart": diffusers.PixArtAlphaPipeline,
}


def perturbed(network: Any) -> Any:
    """No weight is where it starts: many start at zero, or one, and would hide what follows them."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name == "conv_in.weight":
                parameter.mul_(FAINT)
    return network.eval()


def clip_tokens() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges as CLIP's are: bytes, bytes that end a word, merges, and the tokens around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def first_stage() -> AutoencoderKL:
    return perturbed(
        AutoencoderKL(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            sample_size=64,
            scaling_factor=0.7,
        )
    )


def stable_diffusion() -> Any:
    vocabulary, merges = clip_tokens()
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    sizes = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=LENGTH,
        eos_token_id=vocabulary["<|endoftext|>"],
    )
    return diffusers.StableDiffusionPipeline(
        vae=first_stage(),
        text_encoder=perturbed(CLIPTextModel(sizes)),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH),
        unet=perturbed(unet),
        scheduler=diffusers.PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def dit() -> Any:
    transformer = perturbed(
        DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            out_channels=8,
            num_layers=3,
            sample_size=SIDE,
            num_embeds_ada_norm=CLASSES,
            norm_eps=1e-6,
        )
    )
    for block in transformer.transformer_blocks[1:]:  # copies of one, as published
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    scheduler = DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(transformer=transformer, vae=first_stage(), scheduler=scheduler)


def pixart() -> Any:
    # As T5's, it has no token that begins texts, nor one that is called so.
    words = type(TOKENIZER.tokenizer).from_str(TOKENIZER.tokenizer.to_str().replace("<bos>", "<extra>"))
    end, pad = words.id_to_token(TOKENIZER.eos_id), words.id_to_token(TOKENIZER.pad_id)
    words.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, TOKENIZER.eos_id)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, eos_token=end, pad_token=pad)
    sizes = T5Config(
        vocab_size=TOKENIZER.vocab_size,
        d_model=20,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        eos_token_id=TOKENIZER.eos_id,
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        cross_attention_dim=32,
        caption_channels=20,
        sample_size=SIDE,
    )
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=perturbed(T5EncoderModel(sizes)),
        vae=first_stage(),
        transformer=perturbed(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


MAKERS: dict[str, Callable[[], Any]] = {"stable-diffusion": stable_diffusion, "dit": dit, "pixart": pixart}


def as_the_authors_have_it(pipe: Any) -> Any:
    """Of DiT the frequencies of the time, of which diffusers has others."""
    if isinstance(pipe, diffusers.DiTPipeline):
        for block in pipe.transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    pipe.set_progress_bar_config(disable=True)
    return pipe
