/** Recent jobs as bars: colour and mark by state, height by how long they took. */

import type { Job } from "../api/types";
import { duration, seconds, shortUri } from "../lib/format";
import { href, navigate } from "../lib/router";

const HEIGHT = 44;
const MOST = 100;

export function HistoryBar({ jobs, now }: { jobs: Job[]; now: number }) {
  const shown = jobs.slice(0, MOST).reverse();
  const times = shown.map((job) => seconds(job.started_at, job.finished_at, now) ?? 0);
  const longest = Math.max(...times, 1);
  return (
    <div class="history" role="img" aria-label={describe(shown, longest)}>
      {shown.map((job, index) => {
        // The root makes short jobs visible beside long ones.
        const share = Math.sqrt((times[index] ?? 0) / longest);
        return (
          <i
            key={job.id}
            class={`s-${job.state}`}
            data-state={job.state}
            title={`${shortUri(job.output_uri)}: ${job.state}, ${duration(times[index] ?? 0)}`}
            style={{ height: `${Math.max(4, share * HEIGHT)}px` }}
            onClick={() => navigate(href(`jobs/${job.id}`))}
          />
        );
      })}
    </div>
  );
}

function describe(jobs: Job[], longest: number): string {
  const failed = jobs.filter((job) => job.state === "failed").length;
  return `The last ${jobs.length} jobs, oldest first: ${failed} failed, the longest took ${duration(longest)}. The table below lists them.`;
}
