"""The ends of an autoregressive network over pixels."""

import jax
import numpy as np

from vlm_jax.nn.subpixels import smooth_outputs, smooth_tables, waves


def test_near_levels_start_near_each_other():
    basis = np.asarray(waves(256))
    np.testing.assert_allclose(np.linalg.norm(basis, axis=1), 1, rtol=1e-5)
    similarity = np.array([np.mean([basis[i] @ basis[i + d] for i in range(256 - d)]) for d in (0, 1, 4, 16, 64)])
    assert (np.diff(similarity) < -0.02).all()
    assert similarity[1] > 0.9


def test_tables_and_outputs_start_with_the_variance_of_independent_ones():
    tables = smooth_tables(jax.random.key(0), (4, 256, 128))
    np.testing.assert_allclose(np.var(tables, axis=(1, 2)), 1 / 4, rtol=0.2)
    kernel = smooth_outputs(jax.random.key(0), (128, 256))
    np.testing.assert_allclose(np.var(kernel), 1 / 128, rtol=0.2)
