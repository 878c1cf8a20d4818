"""Zero-shot classification: an image belongs to the class whose description is nearest (2103.00020, section 3.1)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlm_jax.evals.subject import Evaluation, Subject


def class_embeddings(subject: Subject) -> Float[Array, "classes D"]:
    """The direction of each class: the mean of its prompts' unit vectors, scaled to length one."""
    model, labelled, tokenizer = subject.model, subject.labelled, subject.tokenizer
    assert labelled is not None and tokenizer is not None and model.embed_text is not None
    # Whatever else stands in a prompt or a name is text: braces, too.
    texts = [prompt.replace("{}", name) for name in labelled.label_names for prompt in labelled.prompts]
    tokens = jnp.asarray(tokenizer.encode(texts, model.inputs["tokens"].shape[0]))
    vectors = jax.jit(model.embed_text)(subject.variables, tokens)
    means = jnp.mean(vectors.reshape(len(labelled.label_names), len(labelled.prompts), -1), axis=1)
    return means / jnp.linalg.norm(means, axis=-1, keepdims=True)


def run(subject: Subject) -> dict[str, float]:
    assert subject.labelled is not None and subject.model.embed_image is not None
    classes = class_embeddings(subject)
    embed_image = jax.jit(subject.model.embed_image)
    correct = []
    for batch, valid in subject.labelled.batches():
        predicted = jnp.argmax(embed_image(subject.variables, batch["image"]) @ classes.T, axis=1)
        correct.append(np.asarray(predicted == batch["label"])[:valid])
    hits = np.concatenate(correct)
    return {"accuracy": float(hits.mean()), "chance": 1 / len(classes), "examples": float(len(hits))}


EVALUATION = Evaluation("zero_shot", ("embed_image", "embed_text"), run, given=("labelled", "tokenizer"))
