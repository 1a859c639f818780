"""The service as a process: the one place where stores, pools and servers are chosen and wired."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from typing import NoReturn

from sqlalchemy.exc import ArgumentError

from merging.errors import MergeError
from merging.storage.base import Storage
from merging.storage.router import open_storage
from service.api.deps import ReadinessCheck, Services
from service.app import create_app
from service.auth import LOGIN_CODE_LIFETIME, prepare_first_token
from service.forecast import Forecast
from service.integrations.telling import Teller
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.store import JobStore
from service.logs import configure_logging
from service.metrics import Metrics
from service.runner.collector import Collector, KeptStatistics
from service.runner.loop import Runner
from service.runner.metrics import RunnerMetrics, metered
from service.runner.settings import RunnerSettings
from service.runner.traces import traced
from service.server import Server, address_of, bind, prepare_process
from service.settings import ENV_PREFIX, Settings
from service.storage_metrics import StorageMetrics
from service.tracing import open_tracing
from service.webhooks.delivery import Caller
from service.webhooks.sender import Sender
from workers.local_pool import LocalPool
from workers.pool import ShardPool
from workers.ray_pool import RayPool
from workers.ray_wire import RayOptions

_HEARTBEAT_SECONDS = 2.0

_LONGEST_RAY_FOLDER = 40
"""Ray's sockets lie some 65 characters deeper, and Unix allows 107; else Ray goes to /tmp."""

_ABORT_SECONDS = 20
"""How long cancelled shards may take to end; a lease that is left then lapses by itself."""


def _to_console(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def serve(settings: Settings, *, announce: Callable[[str], None] = _to_console) -> None:
    """Run API and runner until SIGTERM or SIGINT.

    At the end the server first reports that it is not ready and closes event streams; then shards
    in flight are waited for or cancelled, and jobs are given back, so that another runner (or this
    one, started again) goes on with them at once.

    Args:
        settings: As read at start.
        announce: Tells people where the service is, and its first token.

    Raises:
        MergeError: It cannot start: the port is taken, the database is away, a setting is wrong.
    """
    configure_logging(as_json=settings.log_json)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)  # until the server takes signals over
    with ExitStack() as stack:
        listener = stack.enter_context(bind(settings.host, settings.port))
        store = _open_store(settings)
        stack.callback(store.close)
        first_token = prepare_first_token(store, settings)
        forecast = Forecast(settings.data_dir / "rates.json", settings.device)
        version = metadata.version("mergeyard")
        metrics = Metrics(version, settings.commit)
        storage_metrics = StorageMetrics(metrics.registry)
        storage = storage_metrics.timed(open_storage(settings.storage_roots))
        tracing = open_tracing(settings.otlp_endpoint, version) if settings.otlp_endpoint else None
        if tracing is not None:
            stack.callback(tracing.close)
        runner = None
        if settings.run_jobs:
            pool = _make_pool(settings)
            seen = metered(store, RunnerMetrics(metrics))
            if tracing is not None and settings.otlp_endpoint:
                seen, pool = traced(seen, pool, tracing, settings.otlp_endpoint)
            stack.callback(pool.close)
            runner = _make_runner(settings, seen, pool, forecast, storage_metrics)
        app = create_app(
            settings,
            store,
            storage=storage,
            checks=[
                *([] if runner is None else [_check("runner", lambda: runner.is_running)]),
                _check("webhooks", lambda: sender.is_running, is_required=False),
            ],
            forecast=forecast,
            metrics=metrics,
            tracing=tracing,
        )
        sender = _make_sender(app.state.services)
        server = Server(app, delay_seconds=settings.shutdown_delay_seconds)
        sender.start()
        stack.callback(sender.stop)
        if runner is not None:
            runner.start()
            stack.callback(_stop_runner, runner, settings.drain_seconds)
            _start_collector(stack, settings, store)
        address = address_of(listener, settings.root_path)
        if first_token is not None:
            code = store.create_login_code(first_token.id, LOGIN_CODE_LIFETIME)
            announce(
                f"The first administrator's token is in {settings.admin_token_file}\n"
                f"Open this once, within {LOGIN_CODE_LIFETIME.seconds} seconds, to log in:"
                f" {address}/auth?code={code}"
            )
        announce(f"Mergeyard {version} listens on {address}")
        prepare_process()
        server.run(sockets=[listener])


def migrate(settings: Settings) -> None:
    """Bring the job database to the schema of this version, as ``serve`` does at its start.

    Raises:
        MergeError: The database does not answer, or its address is wrong.
    """
    configure_logging(as_json=settings.log_json)
    _open_store(settings).close()


def _end(number: int, frame: object) -> NoReturn:
    """Leave in order, as after a whole life, when asked to end while still starting."""
    del number, frame
    sys.exit(0)


def _open_store(settings: Settings) -> SqlJobStore:
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise MergeError(
            f"The folder {settings.data_dir} cannot be made ({error.strerror}); name another with"
            f" {ENV_PREFIX}DATA_DIR.",
            code="bad_setting",
        ) from error
    try:
        return open_store(settings.effective_database_url)
    except (ValueError, ArgumentError) as error:
        raise MergeError(f"{ENV_PREFIX}DATABASE_URL: {error}", code="bad_setting") from error


def _make_pool(settings: Settings) -> ShardPool:
    if settings.pool == "local":
        return LocalPool(settings.local_workers)
    folder = str(settings.data_dir / "ray")
    options = RayOptions(
        address=settings.ray_address,
        num_cpus=settings.ray_num_cpus,
        cpus_per_task=settings.task_cpus,
        gpus_per_task=settings.task_gpus,
        memory_per_task=settings.task_memory_bytes,
        temp_dir=folder if len(folder) <= _LONGEST_RAY_FOLDER else None,
    )
    return RayPool(options)


def _make_runner(
    settings: Settings,
    store: JobStore,
    pool: ShardPool,
    forecast: Forecast,
    storage_metrics: StorageMetrics,
) -> Runner:
    def storage() -> Storage:
        return storage_metrics.timed(open_storage(settings.storage_roots))

    return Runner(
        store,
        storage,
        pool,
        RunnerSettings(
            storage_roots=settings.storage_roots,
            device=settings.device,
            max_concurrent_jobs=settings.max_concurrent_jobs,
            max_in_flight_shards=settings.max_in_flight_shards,
            lease_seconds=settings.lease_seconds,
            heartbeat_seconds=min(_HEARTBEAT_SECONDS, settings.lease_seconds / 4),
        ),
        forecast=forecast,
        note_storage=storage_metrics.note_worker,
    )


def _start_collector(stack: ExitStack, settings: Settings, store: SqlJobStore) -> None:
    collector = Collector(
        store,
        lambda: open_storage(settings.storage_roots),
        kept_seconds=3600 * settings.keep_leftovers_hours,
        statistics=_kept_statistics(settings),
    )
    collector.start()
    stack.callback(collector.stop)


def _kept_statistics(settings: Settings) -> KeptStatistics | None:
    """Where statistics are kept; raises ``uri_not_allowed`` outside of the storage roots."""
    if settings.statistics_uri is None:
        return None
    folder = open_storage(settings.storage_roots).normalise(settings.statistics_uri)
    return KeptStatistics(folder, 3600 * settings.keep_statistics_hours)


def _make_sender(services: Services) -> Sender:
    services.keys.load()
    deliveries = services.metrics.webhook_deliveries
    return Sender(
        services.store,
        Caller(services.guard),
        services.keys,
        tell_integration=Teller(services.integrations, services.store.get).tell,
        public_url=services.settings.public_url.rstrip("/"),
        clock=services.clock,
        on_attempt=lambda outcome: deliveries.labels(outcome).inc(),
    )


def _check(
    name: str, is_running: Callable[[], bool], *, is_required: bool = True
) -> ReadinessCheck:
    """Of a part of this process. Webhooks can wait for another replica; nothing else does."""

    def check() -> None:
        if not is_running():
            raise MergeError(f"The part {name!r} has stopped.", code="not_ready", retryable=True)

    return ReadinessCheck(name, check, is_required)


def _stop_runner(runner: Runner, drain_seconds: float) -> None:
    if drain_seconds:
        runner.stop(drain=True, timeout_seconds=drain_seconds)
    if runner.is_running:
        runner.stop(drain=False, timeout_seconds=_ABORT_SECONDS)
