/**
 * What the API says of something, kept true by the events of everything: read once the stream
 * stands, so that nothing falls between; what an event says in full is folded in, and what it only
 * says to have changed is read again. While nothing happens nothing is asked for.
 */

import { useCallback, useEffect, useRef, useState } from "preact/hooks";

import type { News, Problem } from "../api/types";
import { Reader } from "./reader";
import { type Live, useStream } from "./useStream";

export interface LiveData<T> {
  data: T | null;
  /** What was last read, also of another key: to be shown until this one's is here. */
  before: T | null;
  problem: Problem | null;
  live: Live;
  /** Read it again now. */
  reload: () => void;
}

export interface Following<T> {
  /** What identifies what is read: another key, another thing. */
  key: string;
  read: (signal: AbortSignal) => Promise<T>;
  types: readonly string[];
  /** What an event says by itself. May be told of one that what was read has already. */
  fold?: (data: T, event: News) => T;
  /** Whether what an event tells of must be read. */
  isNews: (event: News) => boolean;
}

export function useLive<T>({ key, read, types, fold, isNews }: Following<T>): LiveData<T> {
  const [data, setData] = useState<{ key: string; value: T } | null>(null);
  const [problem, setProblem] = useState<Problem | null>(null);
  const position = useRef<number | null>(null);
  const [reader] = useState(() => new Reader<T>(setProblem));
  reader.read = read;
  reader.show = (value, since) => setData({ key, value: fold ? since.reduce(fold, value) : value });

  const reload = useCallback(() => reader.askAnew(), []);
  useEffect(reload, [key]);
  useEffect(() => () => reader.stop(), []);

  const query = new URLSearchParams(types.map((type) => ["type", type]));
  const live = useStream<News>(`v1/events?${query}`, {
    position: () => position.current,
    onEvents: (events, reached) => {
      const hasBegun = position.current === null;
      position.current = reached ?? position.current;
      reader.note(events);
      if (fold && events.length > 0) {
        setData((known) => known && { ...known, value: events.reduce(fold, known.value) });
      }
      if (hasBegun || events.filter(isNews).length > 0) reader.ask();
    },
    onGone: () => {
      position.current = null;
    },
    onState: (state) => {
      // Without a stream what there is can still be shown, as what it is: a look at the past.
      if (state !== "live" && position.current === null) reader.ask();
    },
  });
  const before = data?.value ?? null;
  return { data: data?.key === key ? before : null, before, problem, live, reload };
}
