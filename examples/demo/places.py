"""Where the models are while they are merged: a real S3 server on loopback, or plain folders."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.errors import DemoError
from examples.s3_server import s3_server

_BUCKET = "mergeyard-demo"


@dataclass(frozen=True)
class Place(ABC):
    """Checkpoints by name, all under one storage root.

    Attributes:
        root: URI that everything is under.
        environment: What a process needs to be told to get there.
    """

    root: str
    environment: Mapping[str, str]

    @abstractmethod
    def put(self, folder: Path, name: str) -> None:
        """Store a checkpoint folder as ``name``."""

    @abstractmethod
    def get(self, name: str, folder: Path) -> Path:
        """A local folder with the checkpoint ``name``: ``folder`` if it has to be fetched."""


class _LocalPlace(Place):
    def put(self, folder: Path, name: str) -> None:
        shutil.copytree(folder, Path(self.root, name))

    def get(self, name: str, folder: Path) -> Path:
        del folder
        return Path(self.root, name)


@dataclass(frozen=True)
class _S3Place(Place):
    client: Any

    def put(self, folder: Path, name: str) -> None:
        for path in sorted(folder.iterdir()):
            self.client.upload_file(str(path), _BUCKET, f"{name}/{path.name}")

    def get(self, name: str, folder: Path) -> Path:
        folder.mkdir(parents=True)
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=_BUCKET, Prefix=f"{name}/", Delimiter="/"):
            for item in page.get("Contents", ()):
                path = folder / item["Key"].rpartition("/")[2]
                self.client.download_file(_BUCKET, item["Key"], str(path))
        return folder


@contextmanager
def local_place(folder: Path) -> Iterator[Place]:
    """A folder of our own."""
    folder.mkdir()
    yield _LocalPlace(root=str(folder), environment={})


@contextmanager
def s3_place() -> Iterator[Place]:
    """An S3 server of our own, with one bucket; gone with the block.

    Raises:
        DemoError: It is not installed or did not start.
    """
    with ExitStack() as stack:
        try:
            server = stack.enter_context(s3_server())
        except RuntimeError as error:
            raise DemoError(f"{error}\nWith --local-files the demo does without.") from error
        server.create_bucket(_BUCKET)
        # The user's own files may say things that are meant for other servers.
        files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
        yield _S3Place(
            root=f"s3://{_BUCKET}",
            environment=server.environment() | files,
            client=server.client(),
        )
