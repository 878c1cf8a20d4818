"""What the user did wrong, told in one sentence."""

import re


class UserError(Exception):
    """The input, not the code, is at fault: a file, a field, a batch, a directory.

    The message is one sentence for the person at the terminal: it names the offender and the mend. Commands print it
    without a traceback.
    """


def check_seed(seed: int) -> None:
    """Refuses what makes no key: of a larger one JAX would take the lower 32 bits.

    Raises:
      UserError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed is {seed}: it must lie in [0, 2^32)")


def pattern_fault(pattern: str) -> str | None:
    """Why this is not a regular expression; None: it is one."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None
