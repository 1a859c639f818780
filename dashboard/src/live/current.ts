/** A job as it stands now: what was last read of it, with what its events have said since. */

import type { JobDetail } from "../api/types";
import type { JobView } from "./fold";

const ENDED = new Set(["succeeded", "failed", "cancelled"]);

export function currentJob(job: JobDetail, view: JobView): JobDetail {
  const isReplaying = job.is_terminal && !view.isFinished && view.attempt <= job.attempt;
  if (view.seq === 0 || isReplaying || view.attempt < job.attempt) return job;
  const isSameAttempt = view.attempt === job.attempt;
  return {
    ...job,
    attempt: view.attempt,
    state: view.state,
    is_terminal: ENDED.has(view.state),
    error: view.error ?? (isSameAttempt && view.state === "failed" ? job.error : null),
    progress: view.progress ?? job.progress,
    phases: view.phases.length > 0 ? view.phases : job.phases,
  };
}
