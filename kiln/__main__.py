"""``kiln`` and ``python -m kiln``: the command line."""

from inference.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
