/** When something is read that events tell the changes of. */

import { ApiError } from "../api/client";
import type { News, Problem } from "../api/types";

const GATHER_MILLISECONDS = 1000;

/** Reads one thing at a time, and again if something happened meanwhile; not too often. */
export class Reader<T> {
  read: (signal: AbortSignal) => Promise<T> = () => Promise.reject(new Error("not yet"));
  show: (value: T, since: readonly News[]) => void = () => undefined;
  #since: News[] = [];
  #abort: AbortController | null = null;
  #isAskedAgain = false;
  #pause: ReturnType<typeof setTimeout> | null = null;
  #hasBegun = false;

  constructor(private readonly onProblem: (problem: Problem | null) => void) {}

  /** Events that came; what is being read may not have them yet. */
  note(events: readonly News[]): void {
    if (this.#abort) this.#since.push(...events);
  }

  ask(): void {
    if (this.#abort || this.#pause) this.#isAskedAgain = true;
    else void this.#run();
  }

  /** Something else is to be read: at once, if anything was. */
  askAnew(): void {
    if (!this.#hasBegun) return;
    this.stop();
    void this.#run();
  }

  stop(): void {
    this.#abort?.abort();
    this.#abort = null;
    if (this.#pause) clearTimeout(this.#pause);
    this.#pause = null;
    this.#isAskedAgain = false;
  }

  async #run(): Promise<void> {
    const abort = new AbortController();
    this.#abort = abort;
    this.#since = [];
    this.#hasBegun = true;
    try {
      const value = await this.read(abort.signal);
      if (abort.signal.aborted) return;
      this.show(value, this.#since);
      this.onProblem(null);
    } catch (error) {
      if (abort.signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      this.onProblem(error.problem);
    }
    this.#abort = null;
    this.#pause = setTimeout(() => {
      this.#pause = null;
      if (!this.#isAskedAgain) return;
      this.#isAskedAgain = false;
      void this.#run();
    }, GATHER_MILLISECONDS);
  }
}
