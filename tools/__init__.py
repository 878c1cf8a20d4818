"""Commands that evaluate, draw and time what was trained."""

import signal
import sys

if sys.argv[0] == "-m":
    # A command is about to import seconds' worth of libraries: Ctrl-C ends it there and then, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
