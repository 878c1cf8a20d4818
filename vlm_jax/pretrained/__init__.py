"""Public checkpoints: one file for each published layout, which is read into a family's variables and written back."""

from vlm_jax.pretrained import clip_hf, llama, llama_gguf, llava, siglip
from vlm_jax.pretrained.layout import Layout

LAYOUTS: tuple[Layout, ...] = (llama.LAYOUT, llama_gguf.LAYOUT, clip_hf.LAYOUT, siglip.LAYOUT, *llava.LAYOUTS)
"""All that `tools.convert` knows."""
