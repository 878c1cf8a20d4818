"""How much of an image an autoencoder keeps: of its pixels, and of what judges see in it; and how it uses its codes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from vlm_jax.contract import Input, Variables
from vlm_jax.evals.judge import Judge, by_each
from vlm_jax.evals.pca import psnr_of_pca
from vlm_jax.evals.pixels import psnr
from vlm_jax.evals.retrieval import alike, captions_of, gallery, recall_at
from vlm_jax.evals.subject import Evaluation, Subject
from vlm_jax.evals.writing import Metrics

WINDOW = 7
"""Height and width in pixels of what SSIM compares."""
KEPT = ("recall@1", "real_recall@1", "recall@1_kept")
"""What is measured by a judge; not defined where images have no captions, or the judge reads none."""


def run(subject: Subject) -> Metrics:
    """Of the mean latents: PSNR in dB and SSIM (Wang et al. 2004), means over the images.

    The PSNR of an image that comes back as it was is infinite. SSIM needs images of at least its window. Where the
    latents are a map, the PSNR of principal components of as many numbers stands beside (`psnr_of_pca`); where they are
    codes, how those are used; where there are judges, how often what is left of an image still finds its caption.
    """
    # Loads scipy.stats: 0.7 s of every start.
    from skimage.metrics import structural_similarity

    spec, encode, decode = subject.model.inputs["image"], subject.model.encode, subject.model.decode
    assert spec.limit is not None and encode is not None and decode is not None

    @jax.jit
    def reconstruct(variables: Variables, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents = encode(variables, image)
        return latents, decode(variables, latents)

    similarity = partial(structural_similarity, win_size=WINDOW, data_range=spec.limit - 1, channel_axis=-1)
    size, judges, captions = codes_of(subject.model.latents), subject.judges or (), captions_of(subject)
    witnesses = [] if captions is None else [Witness(judge) for judge in judges if judge.reads]
    decibels, ssim, codes = [], [], []
    for batch, valid in subject.batches():
        latents, copies = reconstruct(subject.variables, batch["image"])
        originals, restored = np.asarray(batch["image"])[:valid], np.asarray(copies)[:valid]
        decibels.append(psnr(originals, restored, spec.limit))
        if min(originals.shape[1:3]) >= WINDOW:
            ssim += [similarity(image, copy) for image, copy in zip(originals, restored, strict=True)]
        if size is not None:
            codes.append(np.asarray(latents)[:valid])
        for witness in witnesses:
            witness.look(originals, restored, spec.limit)
    found: Metrics = {"psnr": float(np.mean(np.concatenate(decibels)))}
    if ssim:
        found["ssim"] = float(np.mean(ssim))
    shape, pictures = map_of(subject.model.latents), subject.pictures
    if shape is not None and pictures is not None and pictures.training is not None:
        found["psnr_of_pca"] = psnr_of_pca(pictures, math.prod(shape))
    if size is not None:
        found |= use_of_codes(np.concatenate(codes), size)
    kept = {witness.judge.name: witness.kept(captions or ()) for witness in witnesses}
    return found | by_each(judges, lambda judge: kept.get(judge.name, dict.fromkeys(KEPT)))


@dataclass(frozen=True)
class Witness:
    """What a judge sees in the images of a split and in their copies, batch by batch."""

    judge: Judge
    contents: list[bytes] = field(default_factory=list)
    originals: list[Float[np.ndarray, "B D"]] = field(default_factory=list)
    copies: list[Float[np.ndarray, "B D"]] = field(default_factory=list)

    def look(self, originals: UInt8[np.ndarray, "B H W C"], copies: UInt8[np.ndarray, "B H W C"], levels: int) -> None:
        self.contents.extend(image.tobytes() for image in originals)
        self.originals.append(self.judge.embeddings([originals], levels))
        self.copies.append(self.judge.embeddings([copies], levels))

    def kept(self, captions: Sequence[Sequence[str]]) -> Metrics:
        """How often a copy finds a caption of its image first of all, the image itself does, and what share is left."""
        texts, belongs = gallery(self.judge, captions, alike(self.contents))
        copied, real = (
            recall_at(np.concatenate(vectors) @ texts.vectors.T, belongs, 1)
            for vectors in (self.copies, self.originals)
        )
        return dict(zip(KEPT, (copied, real, copied / real if real else None), strict=True))


def map_of(latents: Input | Mapping[str, Input] | None) -> tuple[int, ...] | None:
    """The shape of one map of latents, real [h, w, c] or of codes [h, w] or [h, w, R]; None: they are no such map."""
    return latents.shape if isinstance(latents, Input) and len(latents.shape) in (2, 3) else None


def codes_of(latents: Input | Mapping[str, Input] | None) -> int | None:
    """Of how many codes a map of them is made; None: latents are no codes."""
    return latents.limit if isinstance(latents, Input) and np.issubdtype(latents.dtype, np.integer) else None


def use_of_codes(codes: Int[np.ndarray, "N h w *R"], size: int) -> Metrics:
    """Which share of the codes occurs in the split at all, and exp(-sum p log(p + 1e-10)) of their shares p in it.

    Of several books, [N, h, w, R], a mean over them.
    """
    books = codes.reshape(-1, codes.shape[3]).T if codes.ndim == 4 else codes.reshape(1, -1)
    counts = np.stack([np.bincount(book, minlength=size) for book in books])
    p = counts / counts.sum(axis=1, keepdims=True)
    perplexity = np.exp(-np.sum(p * np.log(p + 1e-10), axis=1))
    return {"code_use": float(np.mean(counts > 0)), "code_perplexity": float(np.mean(perplexity))}


EVALUATION = Evaluation("reconstruction", ("encode", "decode"), run, if_given=("judges", "pictures", "records"))
