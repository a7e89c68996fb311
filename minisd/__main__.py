"""`python -m minisd` is the command `minisd`."""

import sys


def run() -> int:
    """The command line.  Ctrl-C has one word for an answer from the first import on, which takes a moment."""
    try:
        from .cli.main import main

        return main()
    except KeyboardInterrupt:
        print("minisd: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run())
