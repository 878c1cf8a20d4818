"""Where an average of the parameters is kept, it is what validation scores."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.contract import Aux, Input, Model
from vlm_jax.train.loop import Validation, fit
from vlm_jax.train.optim import Optimizer
from vlm_jax.train.plan import Training


def line() -> Model:
    """One number that the gradient moves by the same each step: its loss is its value."""

    def loss(variables: dict, batch: dict, key: jax.Array, step: jax.Array, *, train: bool) -> tuple[jax.Array, Aux]:
        return jnp.mean(variables["params"]["height"] * batch["x"]), Aux({}, jnp.float32(len(batch["x"])))

    def init(key: jax.Array, batch: dict) -> dict:
        return {"params": {"height": jnp.float32(5)}}

    return Model(inputs={"x": Input((), "float32")}, init=init, loss=loss, rules=(("height$", ()),))


@pytest.mark.parametrize("decay", [None, 0.5])
def test_validation_scores_the_averaged_parameters_where_an_average_is_kept(
    tmp_path: Path, decay: float | None
) -> None:
    ones = {"x": np.ones(8, np.float32)}

    def batches(*_: object) -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield ones

    training = Training(
        optimizer=Optimizer(learning_rate=0.1, schedule="constant"),
        steps=4,
        batch_size=8,
        ema_decay=decay,
        checkpoint_every=2,
    )
    validation = Validation(lambda rows: iter([(ones, 8)]), batch_size=8)
    state = fit(line(), training, tmp_path, batches, validation)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    score = [each["validation_loss"] for each in lines if "validation_loss" in each][-1]
    now = float(state.params["height"])
    if decay is None:
        assert score == pytest.approx(now)
    else:
        assert score == pytest.approx(float(state.ema["height"])) and abs(score - now) > 0.01
