"""Another data set than a run's, on the command line: `--data.name NAME`."""

from dataclasses import dataclass, replace
from pathlib import Path

from vlm_jax.data import Data
from vlm_jax.errors import UserError
from vlm_jax.workdir import Loaded


@dataclass(frozen=True, kw_only=True)
class OtherData:
    """Which data set to read, as the run reads its own."""

    name: str | None = None
    """Of any data set; None: the run's own."""


def choose_data(workdir: Path, loaded: Loaded, other: OtherData) -> Data:
    """The run's data, or another data set read as the run's is.

    Raises:
      UserError: there is neither.
    """
    data = loaded.experiment.data
    if other.name is not None:
        plain = Data(name=other.name)
        return plain if data is None else replace(data, name=other.name, mixture=(), test=plain.test)
    if data is None:
        raise UserError(f"{workdir} holds a model that was trained on no data set that is known here: give --data.name")
    return data
