"""Webhooks from the job store to a receiver: what goes wrong there, and what becomes of it."""

from __future__ import annotations

import datetime as dt
import json
import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from standardwebhooks import WebhookVerificationError

from service.integrations.telling import Teller
from service.jobs.outbox import (
    Announcement,
    DeliveryFilter,
    DeliveryRecord,
    DeliveryState,
    EndpointRecord,
    NewEndpoint,
)
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.states import JobState
from service.webhooks.address_guard import AddressGuard
from service.webhooks.delivery import RETRY_SECONDS, Caller
from service.webhooks.secrets import SecretKeys
from service.webhooks.sender import LEASE_SECONDS, Sender
from tests.support.documents import REPOSITORY, blocks
from tests.support.fake_clock import FakeClock
from tests.support.jobs import bring_to
from tests.support.receiver import Answer, receiver, wait_until

KEY = "a key of the service that is long enough"
KEYS = SecretKeys([KEY], Path("/nowhere"))
JOB_EVENTS = tuple(kind for kind in Announcement if kind != Announcement.ENDPOINT_TEST)
PUBLIC_URL = "https://merge.example.com"


class RealTimeAfter(FakeClock):
    """Starts now, since receivers check the time of a message; moves when told to."""

    def __init__(self) -> None:
        super().__init__()
        self._start = dt.datetime.now(dt.UTC)


@dataclass
class Post:
    """A job store, and what sends from it."""

    store: SqlJobStore
    clock: FakeClock
    outcomes: list[str]

    @contextmanager
    def sending(self, caller: Caller | None = None) -> Iterator[Sender]:
        sender = Sender(
            self.store,
            caller or Caller(AddressGuard(allow_loopback=True)),
            KEYS,
            tell_integration=Teller({}, self.store.get).tell,
            public_url=PUBLIC_URL,
            clock=self.clock,
            on_attempt=self.outcomes.append,
            poll_seconds=0.01,
        )
        sender.start()
        try:
            yield sender
        finally:
            sender.stop()
        assert not sender.is_running

    def endpoint(self, url: str, **changes: Any) -> EndpointRecord:
        values = {"url": url, "events": JOB_EVENTS, "key_id": KEYS.newest_id, **changes}
        return self.store.create_endpoint(NewEndpoint(**values))

    def deliveries(self, endpoint: EndpointRecord) -> list[DeliveryRecord]:
        found = self.store.list_deliveries(DeliveryFilter(endpoint_id=endpoint.id), limit=100)
        return sorted(found, key=lambda delivery: delivery.data.get("seq", 0))

    def wait_for(self, endpoint: EndpointRecord, state: DeliveryState) -> list[DeliveryRecord]:
        """All deliveries of an endpoint, once they are in a state and not just taken."""
        wait_until(lambda: {d.state for d in self.deliveries(endpoint)} == {state})
        return self.deliveries(endpoint)

    def wait_for_tries(self, number: int) -> None:
        wait_until(lambda: len(self.outcomes) >= number)


@pytest.fixture(autouse=True)
def _no_log_lines() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def post(tmp_path: Path) -> Iterator[Post]:
    clock = RealTimeAfter()
    store = open_store(f"sqlite:///{tmp_path}/jobs.db", clock=clock)
    yield Post(store, clock, [])
    store.close()


def test_a_receiver_is_told_of_a_job_in_signed_messages(post: Post) -> None:
    with receiver() as there, post.sending():
        endpoint = post.endpoint(there.url)
        job, _ = bring_to(post.store, JobState.SUCCEEDED)
        delivered = post.wait_for(endpoint, DeliveryState.DELIVERED)
    got = sorted(there.received, key=lambda request: request.message["data"]["seq"])
    assert [request.message["type"] for request in got] == [
        "job.started",
        "job.output_committed",
        "job.succeeded",
    ]
    for request, delivery in zip(got, delivered, strict=True):
        request.verify(KEYS.secret(endpoint))
        assert request.message_id == delivery.message_id
        assert request.path == "/hook"
        assert request.headers["user-agent"].startswith("Mergeyard/")
        assert len(request.body) < 20_000
        assert (delivery.response_status, delivery.response_body) == (200, "thanks")
        assert delivery.attempts == 1
    data = got[-1].message["data"]
    assert (data["job_id"], data["state"]) == (job.id, "succeeded")
    assert data["url"] == f"{PUBLIC_URL}/v1/jobs/{job.id}"


def test_the_documented_receiver_verifies_messages(post: Post) -> None:
    document = REPOSITORY / "docs" / "webhooks.md"
    (program,), (example,) = blocks(document, "python"), blocks(document, "json")
    names: dict[str, Any] = {}
    exec(program.text, names)
    with receiver() as there, post.sending():
        endpoint = post.endpoint(there.url)
        bring_to(post.store, JobState.PLANNING)
        (request,) = there.wait_for(1)
    message = names["receive"](request.body, request.headers, KEYS.secret(endpoint))
    shown = json.loads(example.text)
    assert message.keys() == shown.keys()
    assert message["data"].keys() == shown["data"].keys()


def test_a_message_that_was_changed_does_not_verify(post: Post) -> None:
    with receiver() as there, post.sending():
        endpoint = post.endpoint(there.url)
        post.store.test_endpoint(endpoint.id)
        (request,) = there.wait_for(1)
    changed = type(request)(request.path, request.headers, request.body + b" ")
    with pytest.raises(WebhookVerificationError):
        changed.verify(KEYS.secret(endpoint))


def test_a_cloudevent_is_sent_to_who_asked_for_it(post: Post) -> None:
    with receiver() as there, post.sending():
        endpoint = post.endpoint(there.url, format="cloudevents")
        job, _ = bring_to(post.store, JobState.PLANNING)
        (request,) = there.wait_for(1)
    request.verify(KEYS.secret(endpoint))
    event = request.message
    assert request.headers["content-type"] == "application/cloudevents+json"
    assert (event["specversion"], event["type"]) == ("1.0", "job.started")
    assert (event["source"], event["subject"]) == (PUBLIC_URL, job.id)
    assert event["id"] == request.message_id


@pytest.mark.parametrize("status", [302, 400, 500])
def test_a_failed_try_is_repeated_after_five_seconds_with_the_same_message(
    post: Post, status: int
) -> None:
    with receiver() as elsewhere, receiver() as there, post.sending():
        there.answers = [Answer(status, b"no", {"location": elsewhere.url})]
        endpoint = post.endpoint(there.url)
        bring_to(post.store, JobState.PLANNING)
        post.wait_for_tries(1)
        (failed,) = post.deliveries(endpoint)
        assert (failed.state, failed.response_status) == (DeliveryState.PENDING, status)
        assert failed.response_body == "no"
        post.clock.advance(1.1 * RETRY_SECONDS[0])
        (delivery,) = post.wait_for(endpoint, DeliveryState.DELIVERED)
        assert elsewhere.received == []  # redirects are not followed
    first, second = there.received
    assert first.message_id == second.message_id == delivery.message_id
    assert first.body == second.body
    assert delivery.attempts == 2
    assert post.outcomes == ["retried", "delivered"]


def test_a_receiver_that_does_not_answer_is_given_up_on_for_this_time(post: Post) -> None:
    never = threading.Event()
    quick = _Impatient(AddressGuard(allow_loopback=True))
    with receiver() as there, post.sending(quick):
        there.answers = [Answer(hang=never)]
        endpoint = post.endpoint(there.url)
        bring_to(post.store, JobState.PLANNING)
        post.wait_for_tries(1)
        (failed,) = post.deliveries(endpoint)
        assert failed.error == "No answer within 0.2 seconds."
        assert failed.response_status is None
        never.set()
        post.clock.advance(1.1 * RETRY_SECONDS[0])
        post.wait_for(endpoint, DeliveryState.DELIVERED)


class _Impatient(Caller):
    """With a limit that tests can wait for."""

    async def post(self, *arguments: Any, **_: Any) -> Any:
        return await super().post(*arguments, limit_seconds=0.2)


def test_a_receiver_that_dribbles_is_cut_off_in_time(post: Post) -> None:
    """The limit is for the whole try: bytes now and then do not extend it."""
    with _dribbling() as url, post.sending(_Impatient(AddressGuard(allow_loopback=True))):
        endpoint = post.endpoint(url)
        post.store.test_endpoint(endpoint.id)
        (failed,) = post.wait_for(endpoint, DeliveryState.FAILED)
        assert failed.error == "No answer within 0.2 seconds."


@contextmanager
def _dribbling() -> Iterator[str]:
    import socket

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    while not ended.wait(0.05):
                        connection.sendall(b"H")
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        ended.set()
        thread.join()


def test_a_receiver_that_is_not_there_is_tried_again(post: Post) -> None:
    with receiver() as there:
        url, port = there.url, int(there.url.split(":")[2].split("/")[0])
    endpoint = post.endpoint(url)
    with post.sending():
        bring_to(post.store, JobState.PLANNING)
        post.wait_for_tries(1)
        (failed,) = post.deliveries(endpoint)
        assert failed.error is not None
        assert failed.error.startswith("The connection failed")
        with receiver(port=port):
            post.clock.advance(1.1 * RETRY_SECONDS[0])
            post.wait_for(endpoint, DeliveryState.DELIVERED)


def test_a_receiver_that_is_gone_is_disabled(post: Post) -> None:
    with receiver() as there, post.sending():
        there.answers = [Answer(410)]
        endpoint = post.endpoint(there.url)
        bring_to(post.store, JobState.PLANNING)
        post.wait_for(endpoint, DeliveryState.FAILED)
        shown = post.store.get_endpoint(endpoint.id)
        assert not shown.is_enabled
        assert shown.flag is not None
        bring_to(post.store, JobState.FAILED)
        assert len(post.deliveries(endpoint)) == 1


def test_a_receiver_that_asks_for_patience_gets_nothing_meanwhile(post: Post) -> None:
    with receiver() as there, post.sending():
        there.answers = [Answer(429, headers={"retry-after": "120"})]
        endpoint = post.endpoint(there.url)
        bring_to(post.store, JobState.PLANNING)
        post.wait_for_tries(1)
        paused_until = post.store.get_endpoint(endpoint.id).paused_until
        assert paused_until == post.clock() + dt.timedelta(seconds=120)
        bring_to(post.store, JobState.PLANNING)
        other = post.endpoint(there.url)
        post.store.test_endpoint(other.id)
        post.wait_for(other, DeliveryState.DELIVERED)
        assert len(there.received) == 2  # nothing more for the paused one
        post.clock.advance(140)
        assert len(post.wait_for(endpoint, DeliveryState.DELIVERED)) == 2


def test_after_the_last_try_the_endpoint_is_flagged_and_a_replay_helps(post: Post) -> None:
    with receiver() as there, post.sending():
        there.answers = [Answer(500)] * 10
        endpoint = post.endpoint(there.url)
        bring_to(post.store, JobState.PLANNING)
        for tries, seconds in enumerate((*RETRY_SECONDS, 0), 1):
            post.wait_for_tries(tries)
            post.clock.advance(1.1 * seconds)
        (given_up,) = post.wait_for(endpoint, DeliveryState.FAILED)
        assert given_up.attempts == 10
        flag = post.store.get_endpoint(endpoint.id).flag
        assert flag is not None
        assert given_up.id in flag
        replay = post.store.replay_delivery(endpoint.id, given_up.id)
        wait_until(
            lambda: post.store.get_delivery(endpoint.id, replay.id).state == DeliveryState.DELIVERED
        )
        assert post.store.get_endpoint(endpoint.id).flag is None
    assert len({request.message_id for request in there.received}) == 1
    assert len(there.received) == 11


def test_while_a_secret_is_rotated_both_verify(post: Post) -> None:
    with receiver() as there, post.sending():
        endpoint = post.endpoint(there.url)
        old = KEYS.secret(endpoint)
        overlap = dt.timedelta(hours=1)
        rotated = post.store.rotate_endpoint(endpoint.id, KEYS.newest_id, overlap)
        post.store.test_endpoint(endpoint.id)
        (request,) = there.wait_for(1)
        for secret in (old, KEYS.secret(rotated)):
            request.verify(secret)
        post.store.rotate_endpoint(endpoint.id, KEYS.newest_id, dt.timedelta(0))
        post.store.test_endpoint(endpoint.id)
        request = there.wait_for(2)[-1]
        for secret in (old, KEYS.secret(rotated)):
            with pytest.raises(WebhookVerificationError):
                request.verify(secret)


def test_without_the_key_nothing_is_sent_and_the_owner_is_told_why(post: Post) -> None:
    with receiver() as there, post.sending():
        endpoint = post.endpoint(there.url, key_id="of-another")
        post.store.test_endpoint(endpoint.id)
        (failed,) = post.wait_for(endpoint, DeliveryState.FAILED)
        assert failed.error is not None
        assert "MERGEYARD_SECRET_KEYS" in failed.error
        assert there.received == []


def test_a_fault_of_our_own_is_one_more_failed_try(post: Post) -> None:
    class Broken(Caller):
        async def post(self, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError("secret")

    with post.sending(Broken(AddressGuard(allow_loopback=True))):
        endpoint = post.endpoint("http://127.0.0.1:9/")
        bring_to(post.store, JobState.PLANNING)
        post.wait_for_tries(1)
    (failed,) = post.deliveries(endpoint)
    assert failed.state == DeliveryState.PENDING
    assert failed.error == "The service failed in a way that it should not (ZeroDivisionError)."


def test_only_the_beginning_of_a_reply_is_kept(post: Post) -> None:
    with receiver() as there, post.sending():
        there.answers = [Answer(200, b"\x00\xff" + b"x" * 5_000_000)]
        endpoint = post.endpoint(there.url)
        post.store.test_endpoint(endpoint.id)
        (delivered,) = post.wait_for(endpoint, DeliveryState.DELIVERED)
    assert delivered.response_body == "��" + "x" * 1022


def test_one_slow_receiver_holds_up_nobody_else(post: Post) -> None:
    released = threading.Event()
    with receiver() as slow, receiver() as quick, post.sending():
        slow.answers = [Answer(hang=released)] * 3
        first = post.endpoint(slow.url)
        second = post.endpoint(quick.url)
        for _ in range(3):
            post.store.test_endpoint(first.id)
        for _ in range(3):
            post.store.test_endpoint(second.id)
        assert len(post.wait_for(second, DeliveryState.DELIVERED)) == 3
        assert len(slow.received) == 1  # one at a time
        released.set()
        post.wait_for(first, DeliveryState.DELIVERED)


def test_of_several_replicas_one_sends_each_message(post: Post) -> None:
    with receiver() as there, ExitStack() as stack:
        endpoint = post.endpoint(there.url)
        made = {post.store.test_endpoint(endpoint.id).message_id for _ in range(40)}
        for _ in range(3):
            stack.enter_context(post.sending())
        post.wait_for(endpoint, DeliveryState.DELIVERED)
    assert Counter(request.message_id for request in there.received) == Counter(made)


def test_what_a_dead_sender_had_taken_is_sent_by_another(post: Post) -> None:
    with receiver() as there:
        endpoint = post.endpoint(there.url)
        post.store.test_endpoint(endpoint.id)
        assert post.store.take_delivery(LEASE_SECONDS) is not None  # and then it was killed
        with post.sending():
            post.clock.advance(LEASE_SECONDS)
            (delivered,) = post.wait_for(endpoint, DeliveryState.DELIVERED)
    assert delivered.attempts == 2


# -- addresses


def resolving(*answers: Sequence[str]) -> Any:
    """A resolver that changes its answer; the last one stays."""
    waiting = list(answers)

    async def resolve(host: str, port: int) -> Sequence[str]:
        assert host == "hooks.example.com"
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return resolve


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server that is called hooks.example.com, and what trusts it."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hooks.example.com")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("hooks.example.com")]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return server, ssl.create_default_context(cafile=str(folder / "cert.pem"))


def test_over_tls_host_and_certificate_are_those_of_the_name(
    post: Post, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """The connection goes to a number; certificate and Host header are still of the name."""
    server, trust = certificate
    asked: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    guard = AddressGuard(allow_loopback=True)
    caller = Caller(guard, tls=trust, resolve=resolving(["127.0.0.1"]))
    with receiver(tls=server) as there, post.sending(caller):
        port = there.url.split(":")[2].split("/")[0]
        endpoint = post.endpoint(f"https://hooks.example.com:{port}/hook?a=1")
        post.store.test_endpoint(endpoint.id)
        post.wait_for(endpoint, DeliveryState.DELIVERED)
    (request,) = there.received
    assert request.headers["host"] == f"hooks.example.com:{port}"
    assert request.path == "/hook?a=1"
    assert asked == ["hooks.example.com"]


def test_a_certificate_that_is_not_trusted_gets_no_message(
    post: Post, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    server, _ = certificate
    caller = Caller(AddressGuard(allow_loopback=True), resolve=resolving(["127.0.0.1"]))
    with receiver(tls=server) as there, post.sending(caller):
        port = there.url.split(":")[2].split("/")[0]
        endpoint = post.endpoint(f"https://hooks.example.com:{port}/")
        post.store.test_endpoint(endpoint.id)
        (failed,) = post.wait_for(endpoint, DeliveryState.FAILED)
        assert failed.error is not None
        assert "certificate" in failed.error.lower()
    assert there.received == []


def test_a_name_is_checked_again_at_every_try(post: Post) -> None:
    """Rebinding: it was public when the endpoint was made, and is this machine when it is used."""
    with receiver() as there:
        port = there.url.split(":")[2].split("/")[0]
        answers = resolving(["127.0.0.1"])
        with post.sending(Caller(AddressGuard(), resolve=answers)):
            endpoint = post.endpoint(f"https://hooks.example.com:{port}/")
            post.store.test_endpoint(endpoint.id)
            (failed,) = post.wait_for(endpoint, DeliveryState.FAILED)
    assert failed.error == "hooks.example.com is not at a public address."
    assert there.received == []


def test_the_connection_goes_to_the_number_that_was_checked(
    post: Post, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    """A second answer is never asked for: one try, one question."""
    server, trust = certificate
    questions: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        questions.append(host)
        return ["127.0.0.1"] if len(questions) == 1 else ["10.0.0.1"]

    caller = Caller(AddressGuard(allow_loopback=True), tls=trust, resolve=resolve)
    with receiver(tls=server) as there, post.sending(caller):
        port = there.url.split(":")[2].split("/")[0]
        endpoint = post.endpoint(f"https://hooks.example.com:{port}/")
        post.store.test_endpoint(endpoint.id)
        post.wait_for(endpoint, DeliveryState.DELIVERED)
        post.store.test_endpoint(endpoint.id)
        post.wait_for_tries(2)
    assert questions == ["hooks.example.com"] * 2
    assert len(there.received) == 1
    assert Counter(post.outcomes) == Counter(["delivered", "failed"])
