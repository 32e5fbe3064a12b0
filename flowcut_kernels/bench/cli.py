"""The command line: `flowcut-bench` for the main job, one subcommand per table."""

from __future__ import annotations

import sys

MISSING = "flowcut-bench needs {name}: install the extra with  pip install 'flowcut_kernels[bench]'"


def main() -> None:
    """Console script; one clear line when the bench extra is not installed."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "flowcut_kernels":
            raise
        sys.exit(MISSING.format(name=error.name))
    app(prog_name="flowcut-bench")


if __name__ == "__main__":
    main()
