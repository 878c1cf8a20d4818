"""Another data set than a run's, on the command line: `--data.name NAME`."""

from dataclasses import dataclass, replace

from vlm_jax.data import Data
from vlm_jax.workdir import Loaded


@dataclass(frozen=True, kw_only=True)
class OtherData:
    """Which data set to read, as the run reads its own."""

    name: str | None = None
    """Of any data set; None: the run's own."""


def choose_data(loaded: Loaded, other: OtherData) -> Data:
    """The run's data, or another data set read as the run's is."""
    own, plain = loaded.experiment.data, Data(name=other.name)
    if other.name is None:
        return own
    return replace(own, name=plain.name, mixture=plain.mixture, train=plain.train, test=plain.test)
