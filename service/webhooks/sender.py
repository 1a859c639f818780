"""Delivers what the outbox holds, beside the API: any number of replicas may do so at once.

Each receiver has one delivery under way at a time in each process, so that one that is slow holds
up nobody else. A process that dies loses nothing: what it had taken is due again when its lease
ends, and may then arrive twice.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Protocol

import structlog

from merging.errors import MergeError
from service.jobs.errors import StoreUnavailableError
from service.jobs.news import NewsStore
from service.jobs.outbox import (
    AttemptOutcome,
    DeliveryRecord,
    DeliveryState,
    EndpointRecord,
    Outbox,
    TakenDelivery,
)
from service.webhooks.delivery import Caller, Reply, judge
from service.webhooks.envelope import render_body, signed_headers
from service.webhooks.secrets import SecretKeys

LEASE_SECONDS = 60.0
"""Well above the limit of a try."""

KEPT = timedelta(days=30)
"""How long deliveries can be looked at and replayed."""

NEWS_KEPT = timedelta(days=7)
"""How long who follows all events may be away and go on without a gap."""

_AT_ONCE = 16
_POLL_SECONDS = 1.0
_PRUNE_SECONDS = 3600.0
_STORE_AWAY_SECONDS = 5.0
_GRACE_SECONDS = 5.0

OnAttempt = Callable[[str], None]
"""``on_attempt(outcome)``, for webhooks: ``delivered``, ``retried`` or ``failed``."""


class SentFrom(Outbox, NewsStore, Protocol):
    """Where a sender looks, and where it throws away what is old."""


class Sender:
    """A thread that sends.

    Args:
        outbox: What is to be sent.
        caller: Makes requests.
        keys: For signing.
        tell_integration: Makes a delivery to an integration; blocks.
        public_url: Address of the service as clients see it.
        clock: The time now.
        on_attempt: Counts.
        poll_seconds: How often the outbox is looked into while it is empty.
    """

    def __init__(
        self,
        outbox: SentFrom,
        caller: Caller,
        keys: SecretKeys,
        *,
        tell_integration: Callable[[DeliveryRecord], AttemptOutcome],
        public_url: str,
        clock: Callable[[], datetime],
        on_attempt: OnAttempt = lambda _: None,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._outbox = outbox
        self._caller = caller
        self._keys = keys
        self._tell_integration = tell_integration
        self._public_url = public_url
        self._clock = clock
        self._on_attempt = on_attempt
        self._poll_seconds = poll_seconds
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._prune_at = float("-inf")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._log = structlog.get_logger(__name__)

    @property
    def is_running(self) -> bool:
        """Its thread is alive."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Take up nothing more, and wait a little for what is under way.

        What is cut off is due again when its lease ends.
        """
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(2 * _GRACE_SECONDS)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                has_taken = await self._take()
                await self._prune()
            except StoreUnavailableError as error:
                self._log.warning("outbox_unavailable", detail=error.detail)
                await self._rest(_STORE_AWAY_SECONDS)
            except Exception:  # noqa: BLE001 - a thread that ends silently would send nothing more
                self._log.exception("sender_failed")
                await self._rest(_STORE_AWAY_SECONDS)
            else:
                if not has_taken:
                    await self._rest(self._poll_seconds)
        if self._under_way:
            await asyncio.wait(self._under_way.values(), timeout=_GRACE_SECONDS)

    async def _rest(self, seconds: float) -> None:
        """Until then, or until a delivery is over and its receiver may get the next one."""
        if self._under_way:
            done = asyncio.FIRST_COMPLETED
            await asyncio.wait(self._under_way.values(), timeout=seconds, return_when=done)
        else:
            await asyncio.to_thread(self._stopping.wait, seconds)

    async def _take(self) -> bool:
        if len(self._under_way) >= _AT_ONCE:
            return False
        busy = frozenset(self._under_way)
        taken = await asyncio.to_thread(self._outbox.take_delivery, LEASE_SECONDS, busy=busy)
        if taken is None:
            return False
        receiver = taken.delivery.receiver
        task = asyncio.create_task(self._deliver(taken))
        self._under_way[receiver] = task
        task.add_done_callback(lambda _: self._under_way.pop(receiver))
        return True

    async def _prune(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._prune_at:
            self._prune_at = now + _PRUNE_SECONDS
            await asyncio.to_thread(self._outbox.prune_outbox, KEPT)
            await asyncio.to_thread(self._outbox.prune_news, NEWS_KEPT)

    async def _deliver(self, taken: TakenDelivery) -> None:
        delivery = taken.delivery
        try:
            outcome = await self._try(taken)
            await asyncio.to_thread(self._outbox.finish_attempt, delivery, outcome)
        except Exception:  # noqa: BLE001 - the others go on; this one is due again after its lease
            self._log.exception("delivery_failed", delivery_id=delivery.id)
            return
        is_over = outcome.state != DeliveryState.PENDING
        counted = str(outcome.state) if is_over else "retried"
        if taken.endpoint is not None:
            self._on_attempt(counted)
        self._log.info(
            "delivery",
            delivery_id=delivery.id,
            receiver=delivery.receiver,
            type=str(delivery.type),
            attempt=delivery.attempts,
            outcome=counted,
            status=outcome.response_status,
            error=outcome.error,
        )

    async def _try(self, taken: TakenDelivery) -> AttemptOutcome:
        if taken.endpoint is None:
            return await asyncio.to_thread(self._tell_integration, taken.delivery)
        try:
            reply = await self._post(taken.delivery, taken.endpoint)
        except Exception as error:  # noqa: BLE001 - a fault of ours is one more failed try
            self._log.exception("delivery_crashed", delivery_id=taken.delivery.id)
            name = type(error).__name__
            reply = Reply(error=f"The service failed in a way that it should not ({name}).")
        return judge(reply, taken.delivery, self._clock())

    async def _post(self, delivery: DeliveryRecord, endpoint: EndpointRecord) -> Reply:
        now = self._clock()
        try:
            secrets = self._keys.signing_secrets(endpoint, now)
        except MergeError as error:
            return Reply(error=error.detail)
        body = render_body(delivery, endpoint.format, self._public_url)
        headers = signed_headers(delivery, body, endpoint.format, secrets, now)
        return await self._caller.post(endpoint.url, headers, body)
