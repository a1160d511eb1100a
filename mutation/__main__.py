"""python -m mutation: see run.py."""

import sys

from mutation.run import main

sys.exit(main(sys.argv[1:]))
