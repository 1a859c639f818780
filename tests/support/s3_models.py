"""Putting test checkpoints into the S3 server and getting results back."""

from __future__ import annotations

from pathlib import Path

from examples.s3_server import S3Server


def upload_folder(s3: S3Server, folder: Path, bucket: str, prefix: str) -> str:
    """Upload the files of a folder; returns its ``s3://`` address."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            s3.client().upload_file(str(path), bucket, key)
    return f"s3://{bucket}/{prefix}"


def download_prefix(s3: S3Server, uri: str, folder: Path) -> Path:
    """Download everything below an ``s3://`` address."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    for page in pages:
        for entry in page.get("Contents", ()):
            target = folder / entry["Key"].removeprefix(prefix).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            s3.client().download_file(bucket, entry["Key"], str(target))
    return folder
