"""Contrastive losses between two batches of paired embeddings.

Both compare every image with every text of the global batch: under `jit` over a mesh, `image @ text.T` spans all
devices as it stands.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def info_nce(
    image: Float[Array, "B D"], text: Float[Array, "B D"], scale: Float[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """CLIP's loss (2103.00020, figure 3): the mean of the cross-entropies of choosing the text and the image.

    Args:
      image, text: unit vectors, row i of one paired with row i of the other.
      scale: the inverse temperature, not its logarithm.
    """
    logits = scale * jnp.matmul(image, text.T, preferred_element_type=jnp.float32)
    # Masked, for a diagonal taken out of rows that several devices share would be gathered first.
    paired = jnp.sum(logits, axis=1, where=jnp.eye(len(logits), dtype=bool))
    image_to_text = jax.nn.logsumexp(logits, axis=1) - paired
    text_to_image = jax.nn.logsumexp(logits, axis=0) - paired
    metrics = {"accuracy": jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(logits)))}
    return jnp.mean(image_to_text + text_to_image) / 2, metrics


def sigmoid(
    image: Float[Array, "B D"], text: Float[Array, "B D"], scale: Float[Array, ""], bias: Float[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """SigLIP's loss (2303.15343, algorithm 1): each pair is a yes-or-no question; a sum over texts, a mean over images.

    Args:
      image, text: unit vectors, row i of one paired with row i of the other.
      scale: the inverse temperature, not its logarithm.
      bias: added to the logits, negative at first for most pairs do not belong together.
    """
    logits = scale * jnp.matmul(image, text.T, preferred_element_type=jnp.float32) + bias
    labels = 2 * jnp.eye(len(logits)) - 1
    metrics = {"accuracy": jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(logits)))}
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(labels * logits), axis=1)), metrics
