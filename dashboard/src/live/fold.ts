/**
 * What a job's events add up to. Events are folded in order of `seq`; one that was seen before
 * changes nothing, so that a stream may be resumed anywhere.
 */

import type { JobEvent, JobState, Phase, Problem, Progress, Receipt, ShardError } from "../api/types";

export type ShardState = "pending" | "running" | "succeeded" | "failed";

/** One try at a shard: a bar of the Gantt chart. */
export interface ShardTry {
  shard: number;
  attempt: number;
  worker: string;
  device: string;
  startedAt: number;
  finishedAt: number | null;
  outcome: "running" | "succeeded" | "retried" | "failed";
  error: ShardError | null;
}

export interface ShardView {
  state: ShardState;
  fetched: number;
  solved: number;
  written: number;
  receipt: Receipt | null;
  error: ShardError | null;
  retries: number;
}

/** A point of the throughput chart: time in milliseconds, bytes and tensors done. */
export interface Sample {
  time: number;
  bytes: number;
  tensors: number;
}

export interface JobView {
  seq: number;
  attempt: number;
  state: JobState;
  progress: Progress | null;
  estimatedFinishAt: string | null;
  phases: Phase[];
  shards: Map<number, ShardView>;
  tries: ShardTry[];
  samples: Sample[];
  warnings: string[];
  error: Problem | null;
  /** All events but those of progress, of which there are too many to be read. */
  events: JobEvent[];
  isFinished: boolean;
  /** Rises when something changed that only the job itself says in full. */
  milestones: number;
}

export function emptyView(): JobView {
  return {
    seq: 0,
    attempt: 1,
    state: "queued",
    progress: null,
    estimatedFinishAt: null,
    phases: [],
    shards: new Map(),
    tries: [],
    samples: [],
    warnings: [],
    error: null,
    events: [],
    isFinished: false,
    milestones: 0,
  };
}

/** Fold one event into the view, in place: twenty events a second for hours leave no garbage. */
export function fold(view: JobView, event: JobEvent): void {
  if (event.seq <= view.seq) return;
  view.seq = event.seq;
  if (event.attempt > view.attempt) beginAttempt(view, event.attempt);
  if (event.type === "job.progress") {
    foldProgress(view, event);
    return;
  }
  view.events.push(event);
  FOLDS[event.type]?.(view, event);
}

const FOLDS: Record<string, (view: JobView, event: JobEvent) => void> = {
  "job.created": (view) => {
    view.milestones += 1;
  },
  "job.state_changed": (view, event) => {
    view.state = event.data.to as JobState;
    view.isFinished = false;
    view.milestones += 1;
  },
  "job.phase_changed": (view, event) => {
    endPhase(view, event.time);
    view.phases.push({
      name: String(event.data.name),
      started_at: event.time,
      finished_at: null,
      message: String(event.data.message ?? ""),
    });
  },
  "job.warning": (view, event) => {
    view.warnings.push(String(event.data.detail));
  },
  "job.output_committed": (view) => {
    view.milestones += 1;
  },
  "job.finished": (view, event) => {
    view.state = event.data.state as JobState;
    view.error = (event.data.error as Problem | undefined) ?? null;
    view.isFinished = true;
    view.milestones += 1;
    view.estimatedFinishAt = null;
    endPhase(view, event.time);
    endTries(view, event.time);
  },
  "shard.started": (view, event) => {
    const shard = event.data.shard_index as number;
    view.shards.set(shard, { ...shardOf(view, shard), ...NOTHING_DONE, state: "running" });
    view.tries.push({
      shard,
      attempt: event.data.attempt as number,
      worker: String(event.data.worker ?? ""),
      device: String(event.data.device ?? ""),
      startedAt: Date.parse(event.time),
      finishedAt: null,
      outcome: "running",
      error: null,
    });
  },
  "shard.finished": (view, event) => {
    const { shard_index: shard, state, receipt, error } = event.data;
    const succeeded = state === "succeeded";
    view.shards.set(shard as number, {
      ...shardOf(view, shard as number),
      state: succeeded ? "succeeded" : "failed",
      receipt: (receipt as Receipt | undefined) ?? null,
      error: (error as ShardError | undefined) ?? null,
    });
    endTry(view, event, succeeded ? "succeeded" : "failed");
  },
  "shard.retried": (view, event) => {
    const shard = event.data.shard_index as number;
    const before = shardOf(view, shard);
    view.shards.set(shard, {
      ...before,
      ...NOTHING_DONE,
      state: "pending",
      error: event.data.error as ShardError,
      retries: before.retries + 1,
    });
    endTry(view, event, "retried");
  },
};

const NOTHING_DONE = { fetched: 0, solved: 0, written: 0 };

function shardOf(view: JobView, shard: number): ShardView {
  return (
    view.shards.get(shard) ?? {
      ...NOTHING_DONE,
      state: "pending",
      receipt: null,
      error: null,
      retries: 0,
    }
  );
}

/** A retry of the whole job: published shards stay, everything else begins anew. */
function beginAttempt(view: JobView, attempt: number): void {
  view.attempt = attempt;
  view.progress = null;
  view.phases = [];
  view.samples = [];
  view.error = null;
  view.isFinished = false;
  for (const [index, shard] of view.shards) {
    if (shard.state !== "succeeded") {
      view.shards.set(index, { ...shard, ...NOTHING_DONE, state: "pending", error: null });
    }
  }
}

function foldProgress(view: JobView, event: JobEvent): void {
  const progress = event.data.progress as Progress;
  view.progress = progress;
  view.estimatedFinishAt = (event.data.estimated_finish_at as string | null) ?? null;
  view.samples.push({
    time: Date.parse(event.time),
    bytes: progress.bytes_done,
    tensors: progress.tensors_done,
  });
  const changed = (event.data.shards ?? []) as [number, number, number, number][];
  for (const [index, fetched, solved, written] of changed) {
    const shard = shardOf(view, index);
    if (shard.state === "succeeded") continue;
    view.shards.set(index, { ...shard, state: "running", fetched, solved, written });
  }
}

function endPhase(view: JobView, time: string): void {
  const last = view.phases.at(-1);
  if (last && last.finished_at === null) last.finished_at = time;
}

function endTry(view: JobView, event: JobEvent, outcome: ShardTry["outcome"]): void {
  const found = view.tries.findLast(
    (item) => item.shard === event.data.shard_index && item.finishedAt === null,
  );
  if (!found) return;
  found.finishedAt = Date.parse(event.time);
  found.outcome = outcome;
  found.error = (event.data.error as ShardError | undefined) ?? null;
}

function endTries(view: JobView, time: string): void {
  for (const item of view.tries) {
    if (item.finishedAt !== null) continue;
    item.finishedAt = Date.parse(time);
    item.outcome = "failed";
  }
}
