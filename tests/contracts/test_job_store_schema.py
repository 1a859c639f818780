"""The schema, and what the store says when its database is not there."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from service.jobs.database import open_engine
from service.jobs.errors import StoreUnavailableError
from service.jobs.records import IdempotencyRequest, JobFilter, Progress
from service.jobs.rows import to_json
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.tables import jobs, metadata
from tests.support.jobs import listed, new_job
from tests.support.postgres import PostgresServer

MIGRATIONS = Path(__file__).parents[2] / "service" / "migrations"


def test_migrations_make_the_tables_that_the_code_describes(store: SqlJobStore) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrations_make_the_constraints_that_the_code_describes(tmp_path: Path) -> None:
    """Alembic's comparison does not look at checks and partial indexes: compare the statements."""
    described, migrated = (f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "other"))
    engine = open_engine(described)
    metadata.create_all(engine)
    engine.dispose()
    open_store(migrated).close()
    assert statements(described) == statements(migrated)


def test_keys_of_jobs_outlast_their_becoming_keys_of_everything(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    engine = sa.create_engine(url)  # no foreign keys are enforced: a job need not be there
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0008")
        values = "('tok_1', 'POST', '/v1/jobs', 'k', 'sha256:1', 'job_1', :now)"
        insert = sa.text(f"INSERT INTO idempotency_keys VALUES {values}")
        connection.execute(insert, {"now": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")})
    engine.dispose()
    store = open_store(url)
    assert store.find_created(IdempotencyRequest("tok_1", "POST", "/v1/jobs", "k", "sha256:1")) == (
        "job_1"
    )
    store.close()


def test_jobs_that_were_there_before_search_was_are_found_by_all_their_methods(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    engine = open_engine(url)
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0009")
        recipe = {"documents": [{"merge_method": "ties"}, {"merge_method": "linear"}]}
        job = new_job(output_uri="s3://out/Old", labels={"team": "vision"}, recipe=recipe)
        now = datetime.now(UTC)
        values = {
            **{name: value for name, value in to_json(job).items() if name in jobs.c},
            **dict.fromkeys(("attempt", "revision", "event_seq"), 1),
            **dict.fromkeys(("created_at", "queued_at"), now),
            **{"id": "job_1", "state": "queued", "progress": to_json(Progress()), "phases": []},
            **{"fencing_token": 0, "takeovers": 0},
        }
        del values["methods"]
        connection.execute(sa.insert(jobs).values(values))
    engine.dispose()
    store = open_store(url)
    found = listed(store, JobFilter(text="old TEAM=vision ties", method="ties"))
    assert [(job.id, job.methods) for job in found] == [("job_1", ("ties", "linear"))]
    store.close()


def statements(url: str) -> dict[str, list[str]]:
    """The CREATE statement of every table and index, as sorted clauses."""
    query = sa.text("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE '%alembic%'")
    engine = open_engine(url)
    with engine.connect() as connection:
        found = {row.name: words(row.sql) for row in connection.execute(query)}
    engine.dispose()
    return found


@pytest.mark.postgres
def test_postgres_gets_the_same_checks(postgres_server: PostgresServer) -> None:
    open_store(postgres_server.empty_database()).close()
    engine = open_engine(postgres_server.url)
    for table in metadata.sorted_tables:
        checks = {check["name"] for check in sa.inspect(engine).get_check_constraints(table.name)}
        named = {c.name for c in table.constraints if isinstance(c, sa.CheckConstraint)}
        assert checks == named
    engine.dispose()


def words(sql: str | None) -> list[str]:
    """The clauses of a CREATE statement, whatever their order.

    SQLite writes a column that was added later on the line of the one before it.
    """
    lines = re.sub(r", (?=\w+ [A-Z])", ",\n", sql or "").splitlines()
    return sorted(line.strip().rstrip(",") for line in lines)


def test_a_database_without_tables_is_not_ready(empty_url: str) -> None:
    store = open_store(empty_url, migrate=False)
    with pytest.raises(StoreUnavailableError, match="schema"):
        store.ping()
    store.close()


def test_a_database_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/missing/jobs.db", migrate=False)
    with pytest.raises(StoreUnavailableError) as caught:
        store.counts()
    assert caught.value.retryable


@pytest.mark.postgres
def test_connections_that_the_server_closed_are_replaced(postgres_server: PostgresServer) -> None:
    store = open_store(postgres_server.empty_database())
    job, _ = store.submit(new_job())
    other = open_engine(postgres_server.url)
    with other.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    assert store.get(job.id) == job
    assert store.claim("runner-1", 60) is not None
    other.dispose()
    store.close()


@pytest.mark.postgres
def test_no_password_is_told_when_postgres_refuses(postgres_server: PostgresServer) -> None:
    url = postgres_server.url.replace("only-for", "wrong-password-for")
    store = open_store(url, migrate=False)
    with pytest.raises(StoreUnavailableError) as caught:
        store.ping()
    assert "wrong-password-for" not in str(caught.value)
    store.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://u:secret@host/db"])
def test_other_databases_are_refused_without_telling_the_password(url: str) -> None:
    with pytest.raises(ValueError, match="cannot hold jobs") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
