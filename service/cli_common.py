"""What the commands share: options, reading recipes, reaching the service."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from service.client import Client

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file (YAML or JSON); - for stdin.")]
JobArgument = Annotated[str, typer.Argument(help="Id of the job.")]
OutputOption = Annotated[str, typer.Option("--output", "-o", help="Folder, file:// or s3:// URI.")]
UrlOption = Annotated[
    str, typer.Option(envvar="MERGEYARD_URL", help="Address of the service.", show_default=True)
]
TokenOption = Annotated[
    Path | None,
    typer.Option(help="File with the bearer token; MERGEYARD_TOKEN has precedence."),
]
ShardSizeOption = Annotated[str, typer.Option(help="Largest output file, as in 5GB.")]
BudgetOption = Annotated[str, typer.Option(help="Host memory for tensor buffers, as in 4GiB.")]
DeviceBudgetOption = Annotated[
    str | None, typer.Option(help="GPU memory for tensor buffers, as in 70GiB.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of random methods.")]
ThreadsOption = Annotated[int, typer.Option(help="Torch threads per shard.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(help="Workers to count on: layers that take longer than a share are divided."),
]
StatisticsOption = Annotated[
    str | None,
    typer.Option(help="Folder that keeps statistics of samples for other merges."),
]
AdapterRankOption = Annotated[
    int | None,
    typer.Option(
        help="Write merged adapters as an adapter of this rank; 0: of all ranks together."
    ),
]
OverwriteOption = Annotated[bool, typer.Option(help="Replace a checkpoint at the output.")]
FiniteOption = Annotated[bool, typer.Option(help="Fail on NaN or infinity in an input.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_URL = "http://127.0.0.1:8000"


def print_json(value: Any) -> None:
    """Print a value as JSON for people."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def read_recipe(path: str) -> str:
    """The text of a recipe file, or of standard input for ``-``."""
    from merging.errors import RecipeError

    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The recipe {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error


def connect(url: str, token_file: Path | None) -> Client:
    """A client of the service, with the token from the environment or a file."""
    from service.client import ApiError, Client
    from service.settings import default_data_dir

    token = os.environ.get("MERGEYARD_TOKEN", "")
    if not token:
        data_dir = Path(os.environ.get("MERGEYARD_DATA_DIR") or default_data_dir())
        path = token_file or data_dir / "admin-token"
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ApiError(
                {
                    "code": "unauthenticated",
                    "detail": f"No token: MERGEYARD_TOKEN is not set and {path} cannot be read"
                    f" ({reason}). Name the token's file with --token-file.",
                }
            ) from error
    return Client(url, token)
