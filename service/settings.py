"""Settings of the service: from ``MERGEYARD_…`` in the environment, read once at start.

The command line's options have precedence. Secrets are ``SecretStr``, so that printing or logging
the settings does not tell them.
"""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from merging.errors import Fault, MergeError

ENV_PREFIX = "MERGEYARD_"
SHORTEST_KEY = 32
"""Characters of a key from which secrets are derived."""
_WEB_ADDRESS = r"^(https?://[^\s/?#@]+(/[^\s?#]*)?)?$"


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/mergeyard``, by default ``~/.local/share/mergeyard``."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "mergeyard"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Settings(BaseSettings):
    """Everything that an operator can choose."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    host: str = Field(default="127.0.0.1", description="Address to bind.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    root_path: str = Field(
        default="",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="Path prefix under which a proxy publishes the service, as in /mergeyard.",
    )
    body_limit_bytes: int = Field(
        default=1 << 20, ge=1 << 10, description="Largest request body that is accepted."
    )
    shutdown_delay_seconds: float = Field(
        default=0,
        ge=0,
        le=300,
        description="How long to go on answering, not ready, after SIGTERM: time for a load"
        " balancer to look elsewhere.",
    )

    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Folder for what the service keeps: database, first token.",
    )
    database_url: SecretStr = Field(
        default=SecretStr(""),
        description="sqlite:///… or postgresql://…; default: mergeyard.db in the data folder.",
    )
    storage_roots: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Prefixes (folders, s3://bucket/prefix) that jobs may read and write, separated"
        " by commas or as a JSON list. Default: the current folder, only when bound to loopback.",
    )
    admin_token: SecretStr | None = Field(
        default=None,
        min_length=24,
        description="Secret of an administrator's token, where a deployment provides one. Without"
        " it the first start makes one and writes it to admin-token in the data folder.",
    )

    requests_per_second: float = Field(
        default=500,
        gt=0,
        description="What one token may ask of one replica, in the long run; 429 beyond.",
    )
    failed_logins_per_minute: float = Field(
        default=30,
        gt=0,
        description="Tokens, cookies and links that are not valid, of one client address to one"
        " replica; 429 beyond.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Addresses or networks (10.0.0.0/8) of proxies before the service, whose"
        " X-Forwarded-For says from where a request comes. Separated by commas or as a JSON list.",
    )
    max_streams_per_token: int = Field(
        default=256, ge=1, description="Event and log streams that one token may have open."
    )
    max_queued_jobs: int = Field(
        default=20_000, ge=1, description="Jobs that may wait; more are refused with 429."
    )
    max_unfinished_jobs_per_token: int | None = Field(
        default=None, ge=1, description="Jobs of one token that may wait or run; default: any."
    )
    session_hours: float = Field(
        default=12, gt=0, le=24 * 30, description="How long a browser stays logged in."
    )

    run_jobs: bool = Field(
        default=True,
        description="Whether this process drives jobs. One that does not only answers requests,"
        " for others on the same database.",
    )

    public_url: str = Field(
        default="",
        pattern=_WEB_ADDRESS,
        description="Address of the service as its clients see it, prefix included, for links in"
        " webhooks.",
    )
    secret_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Keys from which secrets of webhook endpoints are derived, newest first,"
        " separated by commas; the same in all replicas. Default: one that the first start makes"
        " and keeps in secret-key in the data folder.",
    )
    webhook_allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="If given, webhooks go to these hosts only (names, numbers, *.example.com),"
        " which may then be in a private network. Separated by commas or as a JSON list.",
    )
    webhook_allow_loopback: bool = Field(
        default=False,
        description="Webhooks may go to this machine, also without TLS: for development.",
    )

    integrations: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Integrations of jobs that do not name their own, as in mlflow. Separated by"
        " commas or as a JSON list.",
    )
    mlflow_url: str = Field(
        default="",
        pattern=_WEB_ADDRESS,
        description="MLflow server in whose model registry the integration mlflow registers merged"
        " models.",
    )
    mlflow_credentials: SecretStr | None = Field(
        default=None, description="For it: a bearer token, or user:password."
    )

    pool: Literal["ray", "local"] = Field(
        default="ray", description="What executes shards: Ray, or threads of this process."
    )
    ray_address: str | None = Field(
        default=None, description="Ray cluster to join; by default one is started on this machine."
    )
    ray_num_cpus: int | None = Field(
        default=None, ge=1, description="CPUs of a Ray that is started here; default: all."
    )
    task_cpus: float = Field(
        default=1, gt=0, description="Cores that Ray sets aside for a shard being solved."
    )
    task_gpus: float | None = Field(
        default=None,
        ge=0,
        description="GPUs likewise, may be a fraction; default: 1 where Ray has any when it is"
        " joined, else 0. Name it where machines with GPUs come and go.",
    )
    task_memory_bytes: int = Field(
        default=0, ge=0, description="Host memory likewise; 0 sets none aside."
    )
    local_workers: int = Field(
        default=1, ge=1, description="Threads of the local pool: shards solved at once."
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="Where shards are solved."
    )
    max_concurrent_jobs: int = Field(default=4, ge=1, description="Jobs that one runner drives.")
    workers_per_job: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description=(
            "Workers that plans count on unless a job's options say how many: layers that take"
            " longer than a worker's share are divided."
        ),
    )
    max_in_flight_shards: int | None = Field(
        default=None, ge=1, description="Shards handed out at once; default: as the pool has slots."
    )
    lease_seconds: float = Field(
        default=30,
        ge=2,
        description="How long a runner's silence lasts until others take its jobs over.",
    )
    drain_seconds: float = Field(
        default=0,
        ge=0,
        le=3600,
        description="How long shards in flight may go on after SIGTERM. What is left then is"
        " cancelled and done again by the next runner.",
    )
    keep_leftovers_hours: float = Field(
        default=72,
        ge=0,
        description="How long the unfinished files of failed, cancelled and forgotten jobs are"
        " kept, for a retry to go on from. Then they are removed; a retry starts afresh.",
    )
    statistics_uri: str | None = Field(
        default=None,
        min_length=1,
        description="Folder or s3://bucket/prefix, below a storage root and of this service alone,"
        " in which what methods measure on samples is kept for other jobs. By default it goes with"
        " the job.",
    )
    keep_statistics_hours: float = Field(
        default=168,
        ge=0,
        description="How long statistics are kept there after the last job that used them ended.",
    )
    commit: str = Field(
        default="unknown",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Commit that the service was built from, for mergeyard_build_info; images that"
        " are built with --build-arg COMMIT=... know it.",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Collector of traces that speaks OTLP over HTTP, as in http://host:4318; the"
        " service and its workers send to it, and need the extra otel. Headers for it:"
        " OTEL_EXPORTER_OTLP_HEADERS, in the environment of both.",
    )
    log_json: bool | None = Field(
        default=None, description="Log lines as JSON; default: unless standard error is a terminal."
    )

    @field_validator("port", mode="before")
    @classmethod
    def _refuse_service_link(cls, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            raise ValueError(
                f"{value!r} is what Kubernetes sets for a Service of the same name;"
                " set enableServiceLinks: false in the pod"
            )
        return value

    @field_validator(
        "storage_roots",
        "secret_keys",
        "webhook_allowed_hosts",
        "integrations",
        "trusted_proxies",
        mode="before",
    )
    @classmethod
    def _split_list(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"not a JSON list: {error}") from None
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("storage_roots")
    @classmethod
    def _check_roots(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not root.strip() for root in value):
            raise ValueError("an empty root would allow everything; write / if that is meant")
        # Absolute, since workers run in other folders.
        return tuple(
            root if "://" in root else str(Path(root).expanduser().absolute()) for root in value
        )

    @field_validator("statistics_uri")
    @classmethod
    def _make_absolute(cls, value: str | None) -> str | None:
        if value is None or "://" in value:
            return value
        return str(Path(value).expanduser().absolute())

    @field_validator("trusted_proxies")
    @classmethod
    def _check_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ipaddress.ip_network(network, strict=False)) for network in value)

    @field_validator("secret_keys")
    @classmethod
    def _check_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < SHORTEST_KEY for key in value):
            raise ValueError(f"each key has at least {SHORTEST_KEY} characters")
        return value

    @field_validator("data_dir")
    @classmethod
    def _resolve(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Defaults that depend on other settings."""
        if not values.get("storage_roots") and is_loopback(str(values.get("host", "127.0.0.1"))):
            values["storage_roots"] = [str(Path.cwd())]
        return values

    @model_validator(mode="after")
    def _need_roots(self) -> Self:
        if not self.storage_roots:
            raise ValueError(
                f"{ENV_PREFIX}STORAGE_ROOTS must name what jobs may read and write when the service"
                f" is bound to {self.host}"
            )
        return self

    def href(self, path: str) -> str:
        """An address of this service as clients see it."""
        return f"{self.root_path}{path}"

    @property
    def effective_database_url(self) -> str:
        """The address of the job database, password included."""
        return self.database_url.get_secret_value() or f"sqlite:///{self.data_dir}/mergeyard.db"

    @property
    def secret_key_file(self) -> Path:
        """Where the key is that the first start makes."""
        return self.data_dir / "secret-key"

    @property
    def admin_token_file(self) -> Path:
        """Where the first start leaves the token that it makes."""
        return self.data_dir / "admin-token"


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; ``overrides`` have precedence over the environment.

    Raises:
        MergeError: ``bad_setting``, naming every variable that cannot be used.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        faults = [_fault(item["loc"], item["msg"]) for item in error.errors(include_input=False)]
        detail = "; ".join(fault.detail for fault in faults)
        raise MergeError(
            f"The service cannot start with these settings: {detail}.",
            code="bad_setting",
            faults=faults,
        ) from None


def _fault(location: tuple[int | str, ...], message: str) -> Fault:
    message = message.removeprefix("Value error, ")
    if not location:
        return Fault("", "bad_setting", message)
    return Fault("", "bad_setting", f"{ENV_PREFIX}{str(location[0]).upper()}: {message}")
