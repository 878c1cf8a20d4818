"""How near a reconstruction comes to the image."""

from functools import partial

import jax
import numpy as np

from vlm_jax.evals.subject import Evaluation, Subject

WINDOW = 7
"""Height and width in pixels of what SSIM compares."""


def run(subject: Subject) -> dict[str, float]:
    """Of the mean latents: PSNR in dB and SSIM (Wang et al. 2004), means over the images.

    The PSNR of an image that comes back as it was is infinite. SSIM needs images of at least its window.
    """
    # Loads scipy.stats: 0.7 s of every start.
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    spec = subject.model.inputs["image"]
    encode, decode = subject.model.encode, subject.model.decode
    assert spec.limit is not None and encode is not None and decode is not None
    reconstruct = jax.jit(lambda variables, image: decode(variables, encode(variables, image)))
    similarity = partial(structural_similarity, win_size=WINDOW, data_range=spec.limit - 1, channel_axis=-1)
    psnr, ssim = [], []
    for batch, valid in subject.batches():
        reconstructions = np.asarray(reconstruct(subject.variables, batch["image"]))
        originals = np.asarray(batch["image"])
        for image, copy in zip(originals[:valid], reconstructions[:valid], strict=True):
            with np.errstate(divide="ignore"):
                psnr.append(peak_signal_noise_ratio(image, copy, data_range=spec.limit - 1))
            if min(image.shape[:2]) >= WINDOW:
                ssim.append(similarity(image, copy))
    return {"psnr": float(np.mean(psnr))} | ({"ssim": float(np.mean(ssim))} if ssim else {})


EVALUATION = Evaluation("reconstruction", ("encode", "decode"), run)
