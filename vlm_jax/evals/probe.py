"""Linear probes: what features tell of counts and of vectors by weighted sums, held back by a penalty.

A probe tries penalties from the strongest on and keeps that by which it tells best what it did not learn from. The
first leaves it no weights: features that tell nothing are not heard, and the probe says what it would without them.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

PENALTIES = (math.inf, *(10 ** (-half / 2) for half in range(13)))
"""On the squares of the weights, of features whose variances sum to 1."""
CHECKED = 5
"""One of so many examples, the last ones, tells which penalty is the best of a multinomial probe."""
ITERATIONS = 300
"""Of L-BFGS, at most, for one penalty; it begins where that of the one before ended."""
TOLERANCE = 1e-5
"""Relative gain of an iteration up to which it ends."""


class Multinomial(NamedTuple):
    """log p(v | x) is shares + x W + b up to a constant: multinomial logistic regression."""

    shares: Float[np.ndarray, " V"]
    """log p(v) without features: by the counts that it learned from, each one more, so that none is impossible."""
    weights: Float[np.ndarray, "K+1 V"]
    """The last row is b, which the penalty holds to 0 as it does W."""

    def log_probs(self, x: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N V"]:
        """In float64, but for the product, which is of x's precision."""
        logits = (x @ self.weights[:-1].astype(x.dtype)).astype(np.float64) + self.weights[-1] + self.shares
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def nats(self, x: Float[np.ndarray, "N K"], counts: Float[np.ndarray, "N V"]) -> Float[np.ndarray, " N"]:
        """Of each example -sum_v counts_v log p(v | x)."""
        return -np.sum(counts * self.log_probs(x), axis=1)


def multinomial(
    x: Float[np.ndarray, "N K"], variances: Float[np.ndarray, " K"], counts: Float[np.ndarray, "N V"]
) -> Multinomial:
    """Learns what features tell of counts, each of which is a draw: of a label one, of a text one for each word.

    Minimises the nats a count plus penalty / 2 times the squares of the weights, of the first four fifths of the
    examples with one penalty after the other until the nats of the others grow, then of all with the best.
    """
    kept = len(x) - len(x) // CHECKED
    best, penalty, probe = math.inf, math.inf, None
    for each in PENALTIES:
        tried = minimised(x[:kept], variances, counts[:kept], each, probe)
        nats = float(tried.nats(x[kept:], counts[kept:]).sum())
        if not nats < best:
            break
        best, penalty, probe = nats, each, tried
    return minimised(x, variances, counts, penalty, probe)


def minimised(
    x: Float[np.ndarray, "N K"],
    variances: Float[np.ndarray, " K"],
    counts: Float[np.ndarray, "N V"],
    penalty: float,
    start: Multinomial | None = None,
) -> Multinomial:
    """The probe of one penalty, by L-BFGS.

    Args:
      variances: of the features, by which alone the steps are scaled.
      start: a probe whose weights are near.
    """
    from scipy.optimize import minimize  # half a second to import

    total, sizes = counts.sum(), counts.sum(axis=1, keepdims=True)
    shares = np.log((counts.sum(axis=0) + 1) / (total + counts.shape[1]))
    shape = (x.shape[1] + 1, counts.shape[1])
    if math.isinf(penalty) or not total:
        return Multinomial(shares, np.zeros(shape))
    # The diagonal of the Hessian at no weights: measured by its root, all weights are as curved, and few steps enough.
    p = np.exp(shares)
    scale = 1 / np.sqrt(np.append(variances, 1)[:, None] * p * (1 - p) + penalty)

    def value_and_gradient(flat: Float[np.ndarray, " P"]) -> tuple[float, Float[np.ndarray, " P"]]:
        probe = Multinomial(shares, flat.reshape(shape) * scale)
        log_probs = probe.log_probs(x)
        error = (sizes * np.exp(log_probs) - counts) / total
        gradient = np.concatenate([x.T @ error.astype(x.dtype), error.sum(axis=0, keepdims=True)])
        value = -np.sum(counts * log_probs) / total + penalty / 2 * np.sum(np.square(probe.weights))
        return float(value), ((gradient + penalty * probe.weights) * scale).ravel()

    begin = np.zeros(shape) if start is None else start.weights / scale
    options = {"maxiter": ITERATIONS, "ftol": TOLERANCE, "gtol": 1e-6}
    found = minimize(value_and_gradient, begin.ravel(), jac=True, method="L-BFGS-B", options=options)
    return Multinomial(shares, found.x.reshape(shape) * scale)


def ridge(
    x: Float[np.ndarray, "N K"], variances: Float[np.ndarray, " K"], y: Float[np.ndarray, "N E"]
) -> Float[np.ndarray, "K E"]:
    """W of y = mean + x W, learned of features that are uncorrelated and of mean 0, in closed form.

    It minimises the mean of |y - mean - x W|^2 plus penalty |W|^2, by that penalty with which each example is best told
    by what is learned of all others: an error that has a closed form as well (Allen 1974).
    """
    count, x = len(x), x.astype(np.float64)
    rest = y - y.mean(axis=0)
    products = x.T @ rest / count

    def learned(penalty: float) -> Float[np.ndarray, "K E"]:
        return products / (variances + penalty)[:, None]

    def missed(penalty: float) -> float:
        own = 1 / count + np.square(x) @ (1 / (variances + penalty)) / count  # of an example on what is told of it
        return float(np.mean(np.square((rest - x @ learned(penalty)) / (1 - own)[:, None])))

    return learned(min(PENALTIES, key=missed))
