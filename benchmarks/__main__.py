"""``python -m benchmarks`` lists the benchmarks; with a name and options it runs one."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

HELPERS = frozenset(
    {
        "__init__",
        "__main__",
        "records",
        "processes",
        "sparse_models",
        "instant_service",
        "large_job",
    }
)


def main(arguments: list[str]) -> int:
    """List, or run; the exit status."""
    folder = Path(__file__).parent
    files = {path.stem: path for path in folder.glob("*.py") if path.stem not in HELPERS}
    known = files | {path.parent.name: path for path in folder.glob("*/__main__.py")}
    if arguments and arguments[0] in known:
        sys.argv = [f"benchmarks.{arguments[0]}", *arguments[1:]]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return 0
    for name, file in sorted(known.items()):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        print(f"{name:12} {text.splitlines()[0]}")
    print("\nRun one: python -m benchmarks NAME [options]; --help lists its options.")
    return 0 if not arguments or arguments[0] in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
