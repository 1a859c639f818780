import { expect, test } from "vitest";

import type { JobEvent } from "../src/api/types";
import { emptyView, fold } from "../src/live/fold";
import { Events } from "./events";

function foldAll(events: JobEvent[]) {
  const view = emptyView();
  for (const event of events) fold(view, event);
  return view;
}

test("counts of a shard in work follow progress, and a published one is whole", () => {
  const make = new Events();
  const view = foldAll([make.started(0), make.progress(100, [[0, 3, 2, 1]]), make.finished(0)]);
  expect(view.shards.get(0)).toMatchObject({ state: "succeeded", fetched: 3, solved: 2, written: 1 });
  expect(view.tries).toMatchObject([{ shard: 0, outcome: "succeeded" }]);
});

test("an event that is seen again changes nothing, so a stream may be resumed anywhere", () => {
  const make = new Events();
  const events = [make.started(0), make.progress(100, [[0, 1, 0, 0]]), make.retried(0), make.started(0, 2)];
  const once = foldAll(events);
  const twice = foldAll([...events, ...events.slice(1)]);
  expect(twice).toEqual(once);
});

test("a retried shard begins anew and keeps the error of its last try", () => {
  const make = new Events();
  const view = foldAll([make.started(0), make.progress(100, [[0, 3, 2, 1]]), make.retried(0)]);
  expect(view.shards.get(0)).toMatchObject({
    state: "pending",
    fetched: 0,
    written: 0,
    retries: 1,
    error: { code: "worker_lost" },
  });
  expect(view.tries[0]).toMatchObject({ outcome: "retried", error: { code: "worker_lost" } });
});

test("progress that comes after a shard was published does not undo it", () => {
  const make = new Events();
  const view = foldAll([make.started(0), make.finished(0), make.progress(100, [[0, 1, 0, 0]])]);
  expect(view.shards.get(0)?.state).toBe("succeeded");
});

test("a new attempt keeps published shards and forgets the rest", () => {
  const make = new Events();
  const first = [
    make.event("job.state_changed", { from: "queued", to: "running" }),
    make.started(0),
    make.finished(0),
    make.started(1),
    make.event("job.finished", { state: "failed", error: { code: "internal", detail: "x" } }),
  ];
  const view = foldAll(first);
  expect(view).toMatchObject({ isFinished: true, state: "failed", error: { code: "internal" } });
  expect(view.tries[1]?.outcome).toBe("failed");
  make.attempt = 2;
  fold(view, make.event("job.state_changed", { from: "failed", to: "queued" }));
  expect(view).toMatchObject({ attempt: 2, isFinished: false, state: "queued", error: null, samples: [] });
  expect(view.shards.get(0)?.state).toBe("succeeded");
  expect(view.shards.get(1)?.state ?? "pending").toBe("pending");
});

test("phases end when the next begins, and with the job", () => {
  const make = new Events();
  const view = foldAll([
    make.event("job.phase_changed", { name: "reading_headers", message: "" }),
    make.event("job.phase_changed", { name: "merging", message: "" }),
    make.event("job.finished", { state: "succeeded" }),
  ]);
  expect(view.phases.map((phase) => phase.finished_at !== null)).toEqual([true, true]);
});

test("types that are not known yet are kept for the log", () => {
  const make = new Events();
  const view = foldAll([make.event("job.dreamt", { of: "sheep" })]);
  expect(view.events).toHaveLength(1);
  expect(view.seq).toBe(1);
});
