/** A job's events as a component sees them: folded, and shown at most ten times a second. */

import { useEffect, useRef, useState } from "preact/hooks";

import type { Problem } from "../api/types";
import { emptyView, fold, type JobView } from "./fold";
import { JobStream, type StreamState } from "./stream";

const MILLISECONDS_BETWEEN_RENDERS = 100;

export interface LiveJob {
  view: JobView;
  /** Rises with every change of the view, which is changed in place. */
  version: number;
  stream: StreamState;
  problem: Problem | null;
  /** When something was last heard. */
  heardAt: number;
  /** Follow again: a job that had ended was retried. */
  restart: () => void;
}

export function useJobView(jobId: string): LiveJob {
  const view = useRef<JobView>(emptyView());
  const heardAt = useRef(Date.now());
  const [version, setVersion] = useState(0);
  const [stream, setStream] = useState<StreamState>("connecting");
  const [problem, setProblem] = useState<Problem | null>(null);
  const [round, setRound] = useState(0);

  useEffect(() => {
    view.current = emptyView();
    setStream("connecting");
    setVersion((value) => value + 1);
  }, [jobId]);

  useEffect(() => {
    let follower: JobStream | null = null;
    let timer: ReturnType<typeof setTimeout> | null = null;
    const show = () => {
      timer = null;
      setVersion((value) => value + 1);
    };
    const start = () => {
      follower = new JobStream(jobId, {
        position: () => view.current.seq,
        onEvents: (events) => {
          for (const event of events) fold(view.current, event);
          heardAt.current = Date.now();
          timer ??= setTimeout(show, MILLISECONDS_BETWEEN_RENDERS);
        },
        onState: (state, reason) => {
          setStream(state);
          setProblem(reason);
          if (state === "live") heardAt.current = Date.now();
        },
      });
    };
    // A hidden page gives its connection back: browsers allow six for each server.
    const followVisibility = () => {
      if (document.hidden) {
        follower?.stop();
        follower = null;
      } else if (follower === null) {
        start();
      }
    };
    document.addEventListener("visibilitychange", followVisibility);
    followVisibility();
    return () => {
      document.removeEventListener("visibilitychange", followVisibility);
      follower?.stop();
      if (timer !== null) clearTimeout(timer);
    };
  }, [jobId, round]);

  const restart = () => {
    setStream("connecting");
    setRound((value) => value + 1);
  };
  return { view: view.current, version, stream, problem, heardAt: heardAt.current, restart };
}
