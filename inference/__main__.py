"""``kiln`` and ``python -m inference``."""

from inference.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
