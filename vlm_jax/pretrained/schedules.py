"""The chain of noise that a pipeline of diffusers tells in its `scheduler_config.json`, in and out.

A scheduler says besides how images are drawn, at which steps and by which solver. That is the caller's business here,
and passed over. What is written draws as the solver `ddim` here: its steps are counted from the noisiest one
("trailing"), where those of most published pipelines are counted from the least noisy ("leading").
"""

import math
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.models import diffusion
from vlm_jax.pretrained.settings import expects, require
from vlm_jax.pretrained.source import Source

FILE = "scheduler/scheduler_config.json"
DUE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
ONLY = {"num_train_timesteps": 1000, "trained_betas": None, "clip_sample": False, "thresholding": False}
"""Networks here are told times up to 1000, whatever the number of steps; and predictions of latents have no range."""
BETAS = {"linear": ("linear", 1e-4, 0.02), "scaled_linear": ("scaled_linear", 0.00085, 0.012)}
"""Theirs -> ours, the first and the last."""
COSINE = "squaredcos_cap_v2"
"""Whose first and last stand nowhere."""
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
VARIANCES = {None: "posterior", "fixed_small": "posterior", "fixed_large": "forward"}
VARIANCES |= {"fixed_small_log": "posterior", "fixed_large_log": "forward"}
VARIANCES |= {"learned": "posterior", "learned_range": "posterior"}  # which the channels of the network tell


def chain(source: Source) -> dict[str, Any]:
    """The arguments of a `diffusion.Config` that say what noise there is and what is predicted.

    Raises:
      UserError: it is no chain of 1000 steps, or has a setting that cannot be expressed, which is named.
    """
    told, where = source.beside(FILE), str(source.directory / FILE)
    if lacking := [name for name in DUE if name not in told]:
        raise UserError(f"{where} lacks {lacking[0]}: a chain of noise in steps can be expressed alone")
    expects(told, ONLY, where)
    kind = told["beta_schedule"]
    if kind not in (*BETAS, COSINE):
        raise UserError(f"beta_schedule in {where} is {kind!r}: there are {', '.join((*BETAS, COSINE))}")
    betas, *ends = BETAS.get(kind, ("cosine", None, None))
    for name, only in zip(("beta_start", "beta_end"), ends, strict=True):
        if only is not None and not (isinstance(told[name], float) and math.isclose(told[name], only, rel_tol=1e-6)):
            raise UserError(f"{name} in {where} is {told[name]!r}: of {kind} betas {only} can be expressed alone")
    prediction, variance = told.get("prediction_type", "epsilon"), told.get("variance_type")
    for name, found, table in (
        ("prediction_type", prediction, [*PREDICTIONS]),
        ("variance_type", variance, [*VARIANCES]),
    ):
        if found not in table:
            raise UserError(f"{name} in {where} is {found!r}: there are {', '.join(filter(None, table))}")
    return {
        "betas": betas,
        "predict": PREDICTIONS[prediction],
        "variance": VARIANCES[variance],
        "zero_terminal": told.get("rescale_betas_zero_snr", False),
    }


def told_of(config: diffusion.Config) -> dict[str, Any]:
    """The inverse: a scheduler that draws as `ddim` here, or, where each step has the most variance, as `ancestral`."""
    require({"prior.timesteps": (config.timesteps, 1000)}, "diffusers")
    kind = COSINE if config.betas == "cosine" else config.betas
    _, first, last = BETAS.get(kind, BETAS["linear"])
    whole = {"_class_name": "DDIMScheduler", "set_alpha_to_one": True, "steps_offset": 1}
    if config.variance == "forward":
        whole = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
    return whole | {
        "num_train_timesteps": 1000,
        "beta_schedule": kind,
        "beta_start": first,
        "beta_end": last,
        "trained_betas": None,
        "clip_sample": False,
        "prediction_type": next(theirs for theirs, ours in PREDICTIONS.items() if ours == config.predict),
        "rescale_betas_zero_snr": config.zero_terminal,
        "timestep_spacing": "trailing",
    }
