"""Building and running containers on a machine without an image registry, as root.

Everything is kept in one folder: images, layers, containers. Needed are Debian's ``mmdebstrap``,
``buildah``, ``podman`` and ``runc``; a base image is made from packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.pools import REPOSITORY

BASE = "localhost/base"
IMAGE = "localhost/mergeyard"
_TOOLS = ("mmdebstrap", "buildah", "podman", "runc")
_SECONDS_TO_BUILD = 1200
_SECONDS_TO_RUN = 180

# The settings with which containers run inside of containers and without systemd.
_CONFIGURATION = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def container_tools() -> None:
    """Skip the test, with the reason, where images cannot be built."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"building images needs {', '.join(missing)}: apt-get install")
    if os.geteuid() != 0:
        pytest.skip("building images needs root here")


class Containers:
    """A container engine with its own store in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._names: list[str] = []
        configuration = folder / "containers.conf"
        configuration.write_text(_CONFIGURATION)
        self._environment = os.environ | {"CONTAINERS_CONF": str(configuration)}
        self._run_folder = tempfile.mkdtemp()  # podman takes no path of over 50 characters
        self._store = [f"--root={folder}/storage", f"--runroot={self._run_folder}"]

    def import_base(self) -> None:
        """Make the base image, as small as Debian gets, unless it is there."""
        if self.try_podman("image", "exists", BASE).returncode == 0:
            return
        archive = self._folder / "base.tar"
        packages = "--include=ca-certificates"
        self._run(
            ["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", str(archive)],
            _SECONDS_TO_BUILD,
        )
        self.podman("import", "--quiet", str(archive), BASE)
        archive.unlink()

    def build(self, dockerfile: Path, arguments: dict[str, str]) -> None:
        """Build the image; what pip and npm know of this machine they know in the build."""
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        command = [
            "buildah", *self._store, "bud", "--layers", "--format=docker", "--network=host",
            "--isolation=chroot", *self._mounts(), *options, f"--tag={IMAGE}",
            f"--file={dockerfile}", str(REPOSITORY),
        ]  # fmt: skip
        self._run(command, _SECONDS_TO_BUILD)

    def podman(self, *words: str) -> str:
        """Run podman; what it prints."""
        return self._run(["podman", *self._store, *words], _SECONDS_TO_RUN)

    def try_podman(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run podman, however it ends."""
        return subprocess.run(
            ["podman", *self._store, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS_TO_RUN,
            check=False,
        )

    def start(self, name: str, *command: str, options: list[str]) -> None:
        """Start a container in the background."""
        self._names.append(name)
        self.podman("run", "--detach", f"--name={name}", *options, IMAGE, *command)

    def logs(self) -> str:
        """The ends of what the containers printed."""
        said = [self.try_podman("logs", "--tail=30", name) for name in self._names]
        return "\n".join(
            f"{n}: {s.stdout}{s.stderr}" for n, s in zip(self._names, said, strict=True)
        )

    def remove_all(self) -> None:
        """End and remove the containers."""
        while self._names:  # the last one first, since it may use another's namespaces
            self.try_podman("rm", "--force", "--time=5", "--volumes", self._names.pop())

    def close(self) -> None:
        """Remove the containers and let go of the store's mounts."""
        self.remove_all()
        self.try_podman("umount", "--all")
        subprocess.run(
            ["umount", f"{self._folder}/storage/overlay"], check=False, capture_output=True
        )
        shutil.rmtree(self._run_folder, ignore_errors=True)

    def _mounts(self) -> list[str]:
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            capture_output=True,
            text=True,
            check=True,
        )
        settings = dict(line.split("=", 1) for line in listed.stdout.splitlines() if "=" in line)
        mounts, lines = [], ["[global]"]
        for name in ("cert", "find-links", "index-url", "extra-index-url"):
            found = settings.get(f":env:.{name}") or settings.get(f"global.{name}")
            if found is None:
                continue
            value = found.strip("'")
            lines.append(f"{name} = {value}")
            if Path(value).is_absolute() and Path(value).exists():
                mounts.append(f"--volume={value}:{value}:ro")
        path = self._folder / "pip.conf"
        path.write_text("\n".join(lines) + "\n")
        npm = Path.home() / ".npmrc"
        if npm.exists():
            mounts.append(f"--volume={npm}:/root/.npmrc:ro")
        return [f"--volume={path}:/etc/pip.conf:ro", *mounts]

    def _run(self, command: list[str], seconds: int) -> str:
        done = subprocess.run(
            command,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{command[0]}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout
