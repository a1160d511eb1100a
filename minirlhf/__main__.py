"""`python -m minirlhf` is the `minirlhf` command."""

import sys

from minirlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
