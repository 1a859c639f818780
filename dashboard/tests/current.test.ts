import { expect, test } from "vitest";

import type { JobDetail } from "../src/api/types";
import { currentJob } from "../src/live/current";
import { emptyView, fold } from "../src/live/fold";
import { Events } from "./events";

const RUNNING = { state: "running", is_terminal: false, attempt: 1, error: null, phases: [] } as unknown as JobDetail;

test("what events say is newer than what was read of a job that runs", () => {
  const make = new Events();
  const view = emptyView();
  fold(view, make.event("job.finished", { state: "failed", error: { detail: "No." } }));
  expect(currentJob(RUNNING, view)).toMatchObject({ state: "failed", is_terminal: true, error: { detail: "No." } });
});

test("old events that are being read again do not make an ended job look alive", () => {
  const make = new Events();
  const view = emptyView();
  fold(view, make.event("job.state_changed", { from: "planning", to: "running" }));
  const ended = { ...RUNNING, state: "succeeded", is_terminal: true } as JobDetail;
  expect(currentJob(ended, view).state).toBe("succeeded");
});

test("a retry that somebody else asked for shows", () => {
  const make = new Events();
  make.attempt = 2;
  const view = emptyView();
  fold(view, make.event("job.state_changed", { from: "failed", to: "queued" }));
  const failed = { ...RUNNING, state: "failed", is_terminal: true, error: { detail: "No." } } as unknown as JobDetail;
  expect(currentJob(failed, view)).toMatchObject({ state: "queued", attempt: 2, error: null });
});
