"""What the user did wrong, told in one sentence."""


class UserError(Exception):
    """The input, not the code, is at fault: a file, a field, a batch, a directory.

    The message is one sentence for the person at the terminal: it names the offender and the mend. Commands print it
    without a traceback.
    """
