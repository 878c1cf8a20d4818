"""A run's directory gives back the model that was trained there."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from vlm_jax.errors import UserError
from vlm_jax.sharding import MeshShape, make_mesh
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.trees import leaves_by_path


def saved(workdir: Path, item: str, step: int) -> dict[str, np.ndarray]:
    """An item as the checkpoint holds it."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        vlm_jax.load(workdir).variables["params"],
    )
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return {
            path: np.asarray(leaf)
            for path, leaf in leaves_by_path(checkpoints.restore({item: shapes}, step)[1]).items()
        }


def test_averaged_parameters_are_loaded_where_the_run_kept_an_average(vae_run: Path) -> None:
    loaded = vlm_jax.load(vae_run, step=4)
    actual = {f"ema/{path}": leaf for path, leaf in leaves_by_path(loaded.variables["params"]).items()}
    expected = saved(vae_run, "ema", 4)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def test_the_step_of_least_validation_loss_is_the_default(vae_run: Path) -> None:
    with Checkpoints(vae_run / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best_step() is not None
        assert vlm_jax.load(vae_run).step == checkpoints.best_step()
    assert vlm_jax.load(vae_run, step=2).step == 2


def test_the_newest_is_the_default_where_no_score_was_kept(clip_run: Path) -> None:
    assert vlm_jax.load(clip_run).step == 3


def test_a_mesh_changes_the_layout_and_no_value(clip_run: Path) -> None:
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2))
    one, spread = vlm_jax.load(clip_run).variables, vlm_jax.load(clip_run, mesh=mesh).variables
    jax.tree.map(np.testing.assert_array_equal, one, spread)
    kernel = spread["params"]["image"]["transformer"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)
    assert len(one["params"]["log_scale"].devices()) == 1


def test_a_directory_can_be_moved(clip_run: Path, tmp_path: Path) -> None:
    """Model, variables and tokenizer come from the directory and the installed package alone."""
    moved = shutil.copytree(clip_run, tmp_path / "moved")
    loaded = vlm_jax.load(str(moved))
    tokens = loaded.tokenizer.encode(["red circle"], 16)
    vectors = loaded.model.encode_text(loaded.variables, jnp.asarray(tokens))
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_refuses_a_run_without_checkpoints(clip_run: Path, tmp_path: Path) -> None:
    shutil.copy(clip_run / "config.json", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} has no checkpoint yet"):
        vlm_jax.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_refuses_a_step_that_is_not_there(clip_run: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint 7 in"):
        vlm_jax.load(clip_run, step=7)
