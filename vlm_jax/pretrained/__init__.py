"""Public checkpoints: one file for each published layout, which is read into a family's variables and written back."""

from vlm_jax.pretrained.layout import Layout

LAYOUTS: tuple[Layout, ...] = ()
"""All that `tools.convert` knows."""
