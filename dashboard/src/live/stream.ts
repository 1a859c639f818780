/**
 * A job's event stream over fetch rather than EventSource: that hides comments (by which a silent
 * stream is told from a dead one), drops types that it was not told of, and gives no status.
 */

import { apiUrl, readProblem } from "../api/client";
import type { JobEvent, Problem } from "../api/types";
import { EventStreamParser } from "./sse";

export type StreamState = "connecting" | "live" | "lost" | "ended" | "refused";

const SILENCE_MILLISECONDS = 40_000; // the server says something every 15 s
const LONGEST_WAIT_MILLISECONDS = 15_000;

export interface StreamHandlers {
  /** Sequence number of the last event that was taken in. */
  position: () => number;
  onEvents: (events: JobEvent[]) => void;
  onState: (state: StreamState, problem: Problem | null) => void;
}

/** Follow a job until `stop` is called or it has ended; resumes by itself, without gaps. */
export class JobStream {
  #abort = new AbortController();
  #isStopped = false;
  #failures = 0;

  constructor(
    private readonly jobId: string,
    private readonly handlers: StreamHandlers,
  ) {
    void this.#run();
  }

  stop(): void {
    this.#isStopped = true;
    this.#abort.abort();
  }

  async #run(): Promise<void> {
    let wait = 0;
    while (!this.#isStopped) {
      this.#abort = new AbortController();
      try {
        const next = await this.#follow();
        if (next === null || this.#isStopped) return;
        wait = next;
      } catch {
        if (this.#isStopped) return;
        wait = 1000;
      }
      this.#failures += 1;
      if (this.#failures > 1 || wait > 0) this.handlers.onState("lost", null);
      const longer = Math.min(wait * 2 ** Math.min(this.#failures - 1, 4), LONGEST_WAIT_MILLISECONDS);
      await new Promise((resolve) => setTimeout(resolve, longer));
    }
  }

  /** One connection. Returns how long to wait for the next, or null if there shall be none. */
  async #follow(): Promise<number | null> {
    const after = this.handlers.position();
    const response = await fetch(apiUrl(`v1/jobs/${this.jobId}/events?after=${after}`), {
      headers: { Accept: "text/event-stream" },
      credentials: "same-origin",
      cache: "no-store",
      signal: this.#abort.signal,
    });
    if (response.status === 204) {
      this.handlers.onState("ended", null);
      return null;
    }
    if (!response.ok || !response.body) {
      const problem = await readProblem(response);
      if (response.status >= 500 || response.status === 429) return 2000;
      this.handlers.onState("refused", problem);
      return null;
    }
    this.handlers.onState("live", null);
    this.#failures = 0;
    return this.#read(response.body);
  }

  async #read(body: ReadableStream<Uint8Array>): Promise<number | null> {
    const parser = new EventStreamParser();
    const reader = body.pipeThrough(new TextDecoderStream() as never).getReader() as
      ReadableStreamDefaultReader<string>;
    let isFinished = false;
    for (;;) {
      const silence = setTimeout(() => this.#abort.abort(), SILENCE_MILLISECONDS);
      const { value, done } = await reader.read().finally(() => clearTimeout(silence));
      if (done) break;
      const events = parser.push(value).map((message) => JSON.parse(message.data) as JobEvent);
      if (events.length === 0) continue;
      isFinished = events.at(-1)!.type === "job.finished";
      this.handlers.onEvents(events);
    }
    if (isFinished) {
      this.handlers.onState("ended", null);
      return null;
    }
    return parser.retryMilliseconds;
  }
}
