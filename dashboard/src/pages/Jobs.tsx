import { useEffect, useMemo, useState } from "preact/hooks";

import { HistoryBar } from "../charts/HistoryBar";
import { listPath, readFilters } from "../lib/filters";
import { LIST_TYPES, changesList, foldIntoList, readJobs } from "../lib/jobList";
import { useNow } from "../lib/resource";
import { Link, href, navigate, usePlace } from "../lib/router";
import { useLive } from "../live/useLive";
import { LiveMark } from "../ui/LiveMark";
import { Loading, ProblemNotice, ViewBar } from "../ui/parts";
import { FilterBar } from "./jobs/FilterBar";
import { JobTable } from "./jobs/JobTable";
import { NoJobs } from "./jobs/NoJobs";

const PAGE = 100;

export function JobsPage() {
  const { query } = usePlace();
  const filters = useMemo(() => readFilters(query), [query]);
  const path = useMemo(() => listPath(filters, Date.now(), PAGE), [query]);
  const [most, setMost] = useState({ path, jobs: PAGE });
  const least = most.path === path ? most.jobs : PAGE;
  const list = useLive({
    key: path,
    read: (signal) => readJobs(path, least, signal),
    types: LIST_TYPES,
    fold: foldIntoList,
    isNews: changesList,
  });
  useEffect(list.reload, [least]);
  const now = useNow();
  const [selected, setSelected] = useState<string[]>([]);
  const shown = list.data ?? list.before;
  const jobs = shown?.jobs ?? [];

  return (
    <div class="stack">
      <div class="row spread">
        <h1>Jobs</h1>
        <div class="row">
          <LiveMark live={list.live} now={now} />
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
      <FilterBar filters={filters} counts={shown?.counts ?? null} />
      {list.problem && <ProblemNotice problem={list.problem} />}
      {shown === null ? (
        list.problem ? null : (
          <Loading what="the jobs" />
        )
      ) : jobs.length === 0 ? (
        <NoJobs filters={filters} />
      ) : (
        <div class="stack" aria-busy={list.data === null}>
          <HistoryBar jobs={jobs} now={now} />
          <JobTable jobs={jobs} now={now} selected={selected} onSelect={setSelected} />
          {shown.next && (
            <p class="row">
              <button
                type="button"
                class="button"
                onClick={() => setMost({ path, jobs: jobs.length + PAGE })}
              >
                Older jobs
              </button>
            </p>
          )}
        </div>
      )}
    </div>
  );
}
