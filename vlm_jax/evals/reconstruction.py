"""How near a reconstruction comes to the image."""

import jax
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vlm_jax.evals.subject import Evaluation, Subject


def run(subject: Subject) -> dict[str, float]:
    """PSNR in dB and SSIM (Wang et al. 2004), means over the images."""
    spec = subject.model.inputs["image"]
    assert spec.limit is not None and subject.model.reconstruct is not None
    reconstruct = jax.jit(subject.model.reconstruct)
    psnr, ssim = [], []
    for batch, valid in subject.batches():
        reconstructions = np.asarray(reconstruct(subject.variables, batch["image"]))
        originals = np.asarray(batch["image"])
        for image, copy in zip(originals[:valid], reconstructions[:valid], strict=True):
            psnr.append(peak_signal_noise_ratio(image, copy, data_range=spec.limit - 1))
            ssim.append(structural_similarity(image, copy, data_range=spec.limit - 1, channel_axis=-1))
    return {"psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}


EVALUATION = Evaluation("reconstruction", ("reconstruct",), run)
