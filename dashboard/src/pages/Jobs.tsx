import { useMemo, useState } from "preact/hooks";

import { get } from "../api/client";
import type { Job, JobCounts, Page } from "../api/types";
import { HistoryBar } from "../charts/HistoryBar";
import { listPath, matches, readFilters } from "../lib/filters";
import { useNow, useResource } from "../lib/resource";
import { Link, href, navigate, usePlace } from "../lib/router";
import { Loading, PollMark, ProblemNotice, ViewBar } from "../ui/parts";
import { FilterBar } from "./jobs/FilterBar";
import { JobTable } from "./jobs/JobTable";
import { NoJobs } from "./jobs/NoJobs";

const POLL_SECONDS = 2;

export function JobsPage() {
  const { query } = usePlace();
  const filters = useMemo(() => readFilters(query), [query]);
  const path = useMemo(() => listPath(filters, Date.now()), [query]);
  const list = useResource<Page<Job>>(path, POLL_SECONDS);
  const counts = useResource<JobCounts>("v1/jobs/counts", POLL_SECONDS);
  const older = useOlder(path, list.data?.next_url ?? null);
  const now = useNow();

  const jobs = useMemo(() => {
    const seen = new Map<string, Job>();
    for (const job of [...(list.data?.data ?? []), ...older.jobs]) {
      if (!seen.has(job.id)) seen.set(job.id, job);
    }
    return [...seen.values()].filter((job) => matches(job, filters.text));
  }, [list.data, older.jobs, filters.text]);
  const [selected, setSelected] = useState<string[]>([]);

  return (
    <div class="stack">
      <div class="row spread">
        <h1>Jobs</h1>
        <div class="row">
          <PollMark isLost={list.problem !== null} updatedAt={list.updatedAt} now={now} />
          <ViewBar path={path} />
          {selected.length >= 2 && (
            <button
              type="button"
              class="button"
              onClick={() => navigate(href("compare", { job: selected }))}
            >
              Compare {selected.length} jobs
            </button>
          )}
          <Link to={href("new")} class="button primary">
            New merge
          </Link>
        </div>
      </div>
      <FilterBar filters={filters} counts={counts.data} />
      {list.problem && <ProblemNotice problem={list.problem} />}
      {list.data === null ? (
        list.problem ? null : (
          <Loading what="the jobs" />
        )
      ) : jobs.length === 0 ? (
        <NoJobs filters={filters} />
      ) : (
        <>
          <HistoryBar jobs={jobs} now={now} />
          <JobTable jobs={jobs} now={now} selected={selected} onSelect={setSelected} />
          {older.next && (
            <p class="row">
              <button type="button" class="button" onClick={older.read}>
                Older jobs
              </button>
            </p>
          )}
        </>
      )}
    </div>
  );
}

function useOlder(path: string, firstNext: string | null) {
  const [pages, setPages] = useState<{ path: string; jobs: Job[]; next: string | null } | null>(null);
  const mine = pages?.path === path ? pages : null;
  const next = mine ? mine.next : firstNext;
  const read = async () => {
    if (!next) return;
    const page = await get<Page<Job>>(next);
    setPages({ path, jobs: [...(mine?.jobs ?? []), ...page.data], next: page.next_url });
  };
  return { jobs: mine?.jobs ?? [], next, read };
}
