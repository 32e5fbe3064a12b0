"""The console script `flowcut-bench`; the commands themselves are in ``commands.py``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

EXTRA = ("typer", "rich", "matplotlib", "jinja2", "PIL", "sklearn")


def main() -> None:
    """Run the command line; one clear line, before any work, when the bench extra is not installed."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        sys.exit(f"flowcut-bench needs {', '.join(missing)}: install them with  pip install 'flowcut-kernels[bench]'")
    from .commands import app

    app(prog_name="flowcut-bench")


if __name__ == "__main__":
    main()
