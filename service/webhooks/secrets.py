"""Secrets of webhook endpoints: derived when needed, kept nowhere.

An endpoint's secret is HKDF-SHA-256 (RFC 5869) of one of the service's keys, with the endpoint's
id and the number of its rotations as context. The database holds only these two and the name of the
key, so that a copy of it signs nothing. All replicas need the same keys. A new key goes in front
of the old one: endpoints keep their secrets until they are rotated, and then the old key can go.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from merging.errors import MergeError
from service.jobs.outbox import EndpointRecord
from service.settings import ENV_PREFIX, SHORTEST_KEY

_SECRET_BYTES = 32
_KEY_ID_CHARACTERS = 12


class SecretKeys:
    """The service's keys, newest first.

    Args:
        configured: As the operator chose them; empty: the one in ``file`` is used.
        file: Where a key is kept that was made here.
    """

    def __init__(self, configured: Sequence[str], file: Path) -> None:
        self._configured = configured
        self._file = file

    @property
    def newest_id(self) -> str:
        """Names the key for new secrets."""
        return next(iter(self._keys))

    @cached_property
    def _keys(self) -> dict[str, bytes]:
        """Keys by id. Read when first needed; ids tell nothing of them."""
        texts = self._configured or [read_or_make_key(self._file)]
        if any(len(text) < SHORTEST_KEY for text in texts):
            raise MergeError(
                f"The key in {self._file} has less than {SHORTEST_KEY} characters. Put back what"
                " was there; or remove the file, and rotate every endpoint's secret.",
                code="bad_setting",
            )
        return {_key_id(text): text.encode() for text in texts}

    def load(self) -> None:
        """Read the keys now. Raises ``bad_setting`` if they cannot be had."""
        _ = self._keys

    def secret(self, endpoint: EndpointRecord) -> str:
        """The present secret of an endpoint: ``whsec_`` and base64.

        Raises:
            MergeError: ``bad_setting``: its key is not among ours.
        """
        return self._derive(endpoint.id, endpoint.key_id, endpoint.secret_version)

    def signing_secrets(self, endpoint: EndpointRecord, now: datetime) -> list[str]:
        """The secrets that a message is signed with: the present one, and the one before it while
        that has not expired.
        """
        found = [self.secret(endpoint)]
        expires_at, key_id = endpoint.previous_expires_at, endpoint.previous_key_id
        if key_id is not None and expires_at is not None and now < expires_at:
            found.append(self._derive(endpoint.id, key_id, endpoint.secret_version - 1))
        return found

    def _derive(self, endpoint_id: str, key_id: str, version: int) -> str:
        key = self._keys.get(key_id)
        if key is None:
            raise MergeError(
                f"The service has no key {key_id}, from which the secret of {endpoint_id} comes."
                f" Give all replicas the same {ENV_PREFIX}SECRET_KEYS, or rotate the secret.",
                code="bad_setting",
            )
        info = f"mergeyard webhook {endpoint_id} {version}".encode()
        derived = HKDF(SHA256(), _SECRET_BYTES, salt=None, info=info).derive(key)
        return f"whsec_{base64.b64encode(derived).decode()}"


def _key_id(key: str) -> str:
    return hashlib.sha256(b"mergeyard key id " + key.encode()).hexdigest()[:_KEY_ID_CHARACTERS]


def read_or_make_key(path: Path) -> str:
    """The key in a file that only this user can read; made if there is none.

    Of several processes that make one at the same time, all get the same.

    Raises:
        MergeError: ``bad_setting``: it can be neither read nor written.
    """
    try:
        with suppress(FileNotFoundError):
            return path.read_text().strip()
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(48) + "\n")
        try:
            with suppress(FileExistsError):
                os.link(name, path)
        finally:
            Path(name).unlink()
        return path.read_text().strip()
    except OSError as error:
        raise MergeError(
            f"The key in {path} can be neither read nor made ({error.strerror}). Make the folder"
            f" writable, or set {ENV_PREFIX}SECRET_KEYS.",
            code="bad_setting",
        ) from error
