"""Run the command line: python -m nbbn."""

import sys

from nbbn.cli import main

if __name__ == "__main__":
    sys.exit(main())
