/** Reading one address of the API in a component, again from time to time if wished. */

import { useCallback, useEffect, useRef, useState } from "preact/hooks";

import { ApiError, get } from "../api/client";
import type { Problem } from "../api/types";

export interface Resource<T> {
  data: T | null;
  problem: Problem | null;
  /** When data last came, in milliseconds. */
  updatedAt: number | null;
  reload: () => void;
  set: (data: T) => void;
}

/** Reads `path` (null: not yet), and every `pollSeconds` while the page can be seen. */
export function useResource<T>(path: string | null, pollSeconds?: number): Resource<T> {
  const [data, setData] = useState<T | null>(null);
  const [problem, setProblem] = useState<Problem | null>(null);
  const [updatedAt, setUpdatedAt] = useState<number | null>(null);
  const [round, setRound] = useState(0);
  const shown = useRef<string | null>(null);

  useEffect(() => {
    if (path === null) return undefined;
    if (shown.current !== path) {
      shown.current = path;
      setData(null);
      setProblem(null);
    }
    const abort = new AbortController();
    let timer: ReturnType<typeof setTimeout> | undefined;
    const read = async () => {
      try {
        const answer = await get<T>(path, abort.signal);
        setData(answer);
        setProblem(null);
        setUpdatedAt(Date.now());
      } catch (error) {
        if (abort.signal.aborted) return;
        if (!(error instanceof ApiError)) throw error;
        setProblem(error.problem);
      }
      if (pollSeconds) timer = setTimeout(poll, pollSeconds * 1000);
    };
    const poll = () => {
      if (document.hidden) timer = setTimeout(poll, 1000);
      else void read();
    };
    void read();
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, [path, pollSeconds, round]);

  const reload = useCallback(() => setRound((value) => value + 1), []);
  return { data, problem, updatedAt, reload, set: setData };
}

/** The time, ticking. */
export function useNow(everySeconds = 1, isTicking = true): number {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    if (!isTicking) return undefined;
    const timer = setInterval(() => setNow(Date.now()), everySeconds * 1000);
    return () => clearInterval(timer);
  }, [everySeconds, isTicking]);
  return isTicking ? Math.max(now, Date.now() - everySeconds * 1000) : now;
}
