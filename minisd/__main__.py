"""`python -m minisd` is the command `minisd`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
