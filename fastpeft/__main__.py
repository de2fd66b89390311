"""python -m fastpeft: the command line."""

import sys

from fastpeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
