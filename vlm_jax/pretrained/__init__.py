"""Public checkpoints: one file for each published layout, which is read into a family's variables and written back."""

from vlm_jax.pretrained import (
    big_vision,
    chameleon,
    clip_hf,
    clip_text,
    compvis,
    dit,
    first_stages,
    inception,
    llama,
    llama_gguf,
    llava,
    open_clip,
    openai_clip,
    pixart,
    siglip,
    stable_diffusion,
    t5,
)
from vlm_jax.pretrained.layout import Layout

LAYOUTS: tuple[Layout, ...] = (
    llama.LAYOUT,
    llama_gguf.LAYOUT,
    clip_hf.LAYOUT,
    siglip.LAYOUT,
    open_clip.LAYOUT,
    openai_clip.LAYOUT,
    *big_vision.LAYOUTS,
    *llava.LAYOUTS,
    chameleon.LAYOUT,
    *first_stages.LAYOUTS,
    *compvis.LAYOUTS,
    *clip_text.LAYOUTS,
    t5.LAYOUT,
    inception.LAYOUT,
    stable_diffusion.LAYOUT,
    *dit.LAYOUTS,
    pixart.LAYOUT,
)
"""All that `tools.convert` knows."""
