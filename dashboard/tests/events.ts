/** Events as the service sends them, for tests. */

import type { JobEvent } from "../src/api/types";

export class Events {
  #seq = 0;
  attempt = 1;
  time = Date.parse("2026-03-01T12:00:00Z");

  event(type: string, data: Record<string, unknown>, after = 1000): JobEvent {
    this.#seq += 1;
    this.time += after;
    const time = new Date(this.time).toISOString();
    return { seq: this.#seq, type, time, job_id: "job_1", attempt: this.attempt, data };
  }

  progress(bytes: number, shards: number[][] = [], after = 1000): JobEvent {
    const progress = {
      shards_done: 0,
      shards_total: 2,
      bytes_done: bytes,
      bytes_total: 1000,
      tensors_done: 0,
      tensors_total: 8,
    };
    return this.event("job.progress", { progress, shards, estimated_finish_at: null }, after);
  }

  started(shard: number, attempt = 1): JobEvent {
    return this.event("shard.started", { shard_index: shard, attempt, worker: "w:1", device: "cpu" });
  }

  finished(shard: number, attempt = 1): JobEvent {
    const receipt = { size: 10, interference_removed: [0.5, null] };
    return this.event("shard.finished", { shard_index: shard, attempt, state: "succeeded", receipt });
  }

  retried(shard: number, attempt = 1): JobEvent {
    const error = { code: "worker_lost", detail: "The worker was lost." };
    return this.event("shard.retried", { shard_index: shard, attempt, error });
  }
}
