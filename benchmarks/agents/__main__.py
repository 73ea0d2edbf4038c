"""`python -m benchmarks.agents`."""

import sys

from benchmarks.agents.command import main

if __name__ == "__main__":
    sys.exit(main())
