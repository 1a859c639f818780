/**
 * An event stream over fetch rather than EventSource: that hides comments (by which a silent stream
 * is told from a dead one), drops types that it was not told of, and gives no status.
 */

import { apiUrl, readProblem } from "../api/client";
import type { Problem } from "../api/types";
import { EventStreamParser, type Message } from "./sse";

export type StreamState = "connecting" | "live" | "lost" | "ended" | "refused";

const SILENCE_MILLISECONDS = 40_000; // the server says something every 15 s
const LONGEST_WAIT_MILLISECONDS = 15_000;

export interface StreamHandlers<E> {
  /** Id of the last event that was taken in; null: begin with what comes now. */
  position: () => number | null;
  /** Events, and the id that the stream has come to with them. */
  onEvents: (events: E[], position: number | null) => void;
  onState: (state: StreamState, problem: Problem | null) => void;
  /** What came after the position is not kept any more; called before it is asked for again. */
  onGone?: () => void;
}

interface Event {
  type: string;
}

/** Follow `path` until `stop` is called or it has ended; resumes by itself, without gaps. */
export class EventStream<E extends Event> {
  #abort = new AbortController();
  #isStopped = false;
  #failures = 0;

  constructor(
    private readonly path: string,
    private readonly handlers: StreamHandlers<E>,
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
      // The server ends a stream from time to time and is there at once again: nothing is lost then.
      if (this.#failures > 1 || wait >= 1000) this.handlers.onState("lost", null);
      const longer = Math.min(wait * 2 ** Math.min(this.#failures - 1, 4), LONGEST_WAIT_MILLISECONDS);
      await new Promise((resolve) => setTimeout(resolve, longer));
    }
  }

  /** One connection. Returns how long to wait for the next, or null if there shall be none. */
  async #follow(): Promise<number | null> {
    const after = this.handlers.position();
    const response = await fetch(apiUrl(this.path), {
      headers: {
        Accept: "text/event-stream",
        ...(after === null ? {} : { "Last-Event-ID": String(after) }),
      },
      credentials: "same-origin",
      cache: "no-store",
      signal: this.#abort.signal,
    });
    if (response.status === 204) {
      this.handlers.onState("ended", null);
      return null;
    }
    if (response.status === 410 && this.handlers.onGone) {
      this.handlers.onGone();
      return 0;
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
      const messages = parser.push(value);
      if (messages.length === 0) continue;
      const events = eventsOf<E>(messages);
      if (events.length > 0) isFinished = events.at(-1)!.type === "job.finished";
      this.handlers.onEvents(events, lastId(messages));
    }
    if (isFinished && !this.handlers.onGone) {
      this.handlers.onState("ended", null);
      return null;
    }
    return parser.retryMilliseconds;
  }
}

function eventsOf<E>(messages: readonly Message[]): E[] {
  return messages.flatMap(({ data }) => (data === null ? [] : [JSON.parse(data) as E]));
}

function lastId(messages: readonly Message[]): number | null {
  const id = messages.findLast((message) => message.id !== null)?.id;
  return id === undefined || id === null ? null : Number(id);
}
