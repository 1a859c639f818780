"""Checkpoints that earlier documents of a recipe will make, for planning to read as if they lay
in storage: their headers, configs and tokenizers are known before a byte is merged.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from datetime import datetime

import msgspec

from merging.checkpoint.tokenizer_edit import EDITED, edit_tokenizer_file
from merging.errors import StorageError
from merging.plan.chat_template import TEMPLATE_NAME
from merging.plan.outputs import Companion
from merging.plan.packing import shard_header
from merging.plan.plan import Plan
from merging.storage.base import ObjectStat, Storage, Writer

_SCHEME = "document:"
"""In front of the names of documents, in addresses and messages."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file that will be there.

    Attributes:
        stat: Its address and size; the version is that of the plan that makes it.
        data: All of it, or the header of weights.
        companion: The file in storage that it is a copy of.
        plan: The plan that makes it, if tokens are added to that copy.
    """

    stat: ObjectStat
    data: bytes = b""
    companion: Companion | None = None
    plan: Plan | None = None


class MadeStorage(Storage):
    """A storage in which results of documents lie under their names, beside all that it has.

    Args:
        storage: What lies there.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._files: dict[str, _File] = {}
        self._documents: dict[str, Plan] = {}

    def add(self, name: str, plan: Plan) -> None:
        """Make the result of a document known; its companions are files in storage."""
        folder = f"{_SCHEME}{name}"
        self._documents[folder] = plan
        for shard in plan.outputs:
            self._put(folder, shard.file_name, shard_header(shard.problems), shard.size)
        if plan.config:
            self._put(folder, "config.json", json.dumps(plan.config).encode())
        if plan.chat_template is not None:
            self._put(folder, TEMPLATE_NAME, plan.chat_template.encode())
        for companion in plan.companions:
            stat = self._storage.stat(companion.source_uri)
            uri = f"{folder}/{companion.file_name}"
            is_edited = bool(plan.added_tokens) and companion.file_name in EDITED
            self._files[uri] = _File(
                ObjectStat(uri, stat.size, plan.digest),
                companion=companion,
                plan=plan if is_edited else None,
            )

    def _put(self, folder: str, name: str, data: bytes, size: int | None = None) -> None:
        uri = f"{folder}/{name}"
        stat = ObjectStat(uri, len(data) if size is None else size, self._documents[folder].digest)
        self._files[uri] = _File(stat, data)

    def is_made(self, uri: str) -> bool:
        """Whether an address is that of a result, or a file of one."""
        return uri.startswith(_SCHEME)

    def resolve(self, plan: Plan) -> Plan:
        """A plan with companions that lie in storage, and what is changed in their copies."""
        companions: list[Companion] = []
        added = plan.added_tokens
        template = plan.chat_template
        for companion in plan.companions:
            file = self._files.get(companion.source_uri)
            if file is None:
                companions.append(companion)
            elif file.companion is None:
                template = template or file.data.decode()
            else:
                companions.append(file.companion)
                if file.plan is not None and companion.file_name == "tokenizer.json":
                    added = (*file.plan.added_tokens, *added)
        return msgspec.structs.replace(
            plan, companions=tuple(companions), added_tokens=added, chat_template=template
        )

    def original(self, uri: str) -> Companion | None:
        """The file in storage that a result's file is an unchanged copy of, if it is one."""
        file = self._files[uri]
        return file.companion if file.plan is None else None

    def normalise(self, uri: str) -> str:
        """The canonical form of an address; of a document's name, that of its result."""
        for made in (uri, f"{_SCHEME}{uri}"):
            if made in self._documents:
                return made
        return self._storage.normalise(uri)

    def stat(self, uri: str) -> ObjectStat:
        """As of any storage."""
        if not self.is_made(uri):
            return self._storage.stat(uri)
        if uri in self._files:
            return self._files[uri].stat
        raise StorageError(f"There is nothing at {uri}.", code="not_found", context={"uri": uri})

    def list(self, prefix: str) -> list[ObjectStat]:
        """As of any storage."""
        if not self.is_made(prefix):
            return self._storage.list(prefix)
        found = [file.stat for uri, file in self._files.items() if uri.startswith(f"{prefix}/")]
        return sorted(found, key=lambda stat: stat.uri)

    def read_into(self, uri: str, start: int, buffer: memoryview, *, version: str) -> None:
        """As of any storage; what is not known of weights is zero."""
        if uri in self._files:
            data = self._files[uri].data[start : start + len(buffer)]
            buffer[: len(data)] = data
            buffer[len(data) :] = bytes(len(buffer) - len(data))
        else:
            self._storage.read_into(uri, start, buffer, version=version)

    def read_bytes(self, uri: str, *, limit: int, version: str | None = None) -> bytes:
        """As of any storage."""
        file = self._files.get(uri)
        if file is None:
            return self._storage.read_bytes(uri, limit=limit, version=version)
        if file.companion is None:
            return file.data
        source, name = file.companion.source_uri, file.companion.file_name
        data = self._storage.read_bytes(source, limit=limit, version=file.companion.version)
        if file.plan is None:
            return data
        return edit_tokenizer_file(name, data, source, file.plan.added_tokens)

    def write_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> ObjectStat:
        """As of any storage."""
        return self._storage.write_bytes(uri, data, if_absent=if_absent)

    def open_writer(self, uri: str, size: int) -> Writer:
        """As of any storage."""
        return self._storage.open_writer(uri, size)

    def writer_bytes(self, uri: str, size: int) -> int:
        """As of any storage."""
        return self._storage.writer_bytes(uri, size)

    def copy(self, source: str, target: str, *, version: str) -> ObjectStat:
        """As of any storage."""
        return self._storage.copy(source, target, version=version)

    def delete(self, uri: str) -> None:
        """As of any storage."""
        self._storage.delete(uri)

    def remove_folder(self, uri: str) -> None:
        """As of any storage."""
        self._storage.remove_folder(uri)

    def discard_unfinished(
        self, folder: str, names: Container[str], *, since: datetime, until: datetime
    ) -> int:
        """As of any storage."""
        return self._storage.discard_unfinished(folder, names, since=since, until=until)
