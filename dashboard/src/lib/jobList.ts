/** The list of jobs with its counts, read at once and kept true by events. */

import { get } from "../api/client";
import type { Job, JobCounts, News, Page, Progress } from "../api/types";

export interface JobList {
  jobs: Job[];
  /** Where older ones are; null: there are none. */
  next: string | null;
  counts: JobCounts;
}

/** Everything that changes a row, a count, or which rows there are. */
export const LIST_TYPES = [
  "job.created",
  "job.state_changed",
  "job.progress",
  "job.finished",
  "job.updated",
  "job.forgotten",
];

/** Read the list at `path`, at least `least` jobs of it if there are so many. */
export async function readJobs(path: string, least: number, signal: AbortSignal): Promise<JobList> {
  const [first, counts] = await Promise.all([
    get<Page<Job>>(path, signal),
    get<JobCounts>("v1/jobs/counts", signal),
  ]);
  const jobs = first.data;
  let next = first.next_url;
  while (next !== null && jobs.length < least) {
    const page: Page<Job> = await get<Page<Job>>(next, signal);
    jobs.push(...page.data);
    next = page.next_url;
  }
  return { jobs, next, counts };
}

/** What an event says by itself of a row: how far the job is. */
export function foldIntoList(list: JobList, event: News): JobList {
  const place = list.jobs.findIndex((job) => job.id === event.job_id);
  const job = list.jobs[place];
  if (event.type !== "job.progress" || !job || job.is_terminal) return list;
  const jobs = [...list.jobs];
  jobs[place] = {
    ...job,
    progress: event.data.progress as Progress,
    estimated_finish_at: (event.data.estimated_finish_at as string | null) ?? null,
  };
  return { ...list, jobs };
}

/** Whether the list must be read: its rows or counts have changed in more than progress. */
export function changesList(event: News): boolean {
  return event.type !== "job.progress";
}
