"""Where the command starts, as `ttcompress` or `python -m ttcompress`: quiet if interrupted while modules are read."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from ttcompress.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("ttcompress: interrupted; nothing was written\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
