"""How a training and a command may end."""

from __future__ import annotations

# Exit codes of every command: done; something failed; wrong use; stopped, as after Ctrl-C.
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class DivergedError(Exception):
    """The loss, the gradient, a parameter or an output is not finite."""
