/** A job's events as a component sees them: folded, and shown at most ten times a second. */

import { useEffect, useRef, useState } from "preact/hooks";

import type { JobEvent } from "../api/types";
import { emptyView, fold, type JobView } from "./fold";
import { type Live, useStream } from "./useStream";

const MILLISECONDS_BETWEEN_RENDERS = 100;

export interface LiveJob extends Live {
  view: JobView;
  /** Rises with every change of the view, which is changed in place. */
  version: number;
}

export function useJobView(jobId: string): LiveJob {
  const view = useRef<JobView>(emptyView());
  const timer = useRef<ReturnType<typeof setTimeout> | null>(null);
  const [version, setVersion] = useState(0);

  useEffect(() => {
    view.current = emptyView();
    setVersion((value) => value + 1);
    return () => {
      if (timer.current !== null) clearTimeout(timer.current);
    };
  }, [jobId]);

  const show = () => {
    timer.current = null;
    setVersion((value) => value + 1);
  };
  const live = useStream<JobEvent>(`v1/jobs/${jobId}/events`, {
    position: () => view.current.seq || null,
    onEvents: (events) => {
      for (const event of events) fold(view.current, event);
      if (events.length > 0) timer.current ??= setTimeout(show, MILLISECONDS_BETWEEN_RENDERS);
    },
  });
  return { ...live, view: view.current, version };
}
