"""How a training and a command may end."""

from __future__ import annotations

# Exit codes of every command: done; something failed; wrong use; another command is at work in the folder of
# the results; stopped, as after Ctrl-C.
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_BUSY, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class DivergedError(Exception):
    """The loss, the gradient, a parameter or an output is not finite."""
