/** Reading one address of the API in a component. */

import { useCallback, useEffect, useRef, useState } from "preact/hooks";

import { ApiError, get } from "../api/client";
import type { Problem } from "../api/types";

export interface Resource<T> {
  data: T | null;
  problem: Problem | null;
  reload: () => void;
  set: (data: T) => void;
}

/** Reads `path` (null: not yet). */
export function useResource<T>(path: string | null): Resource<T> {
  const [data, setData] = useState<T | null>(null);
  const [problem, setProblem] = useState<Problem | null>(null);
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
    const read = async () => {
      try {
        setData(await get<T>(path, abort.signal));
        setProblem(null);
      } catch (error) {
        if (abort.signal.aborted) return;
        if (!(error instanceof ApiError)) throw error;
        setProblem(error.problem);
      }
    };
    void read();
    return () => abort.abort();
  }, [path, round]);

  const reload = useCallback(() => setRound((value) => value + 1), []);
  return { data, problem, reload, set: setData };
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
