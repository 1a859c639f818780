import { useMemo, useState } from "preact/hooks";

import { get } from "../api/client";
import { JOB_STATES, type Job, type JobCounts, type JobState, type Page } from "../api/types";
import { HistoryBar } from "../charts/HistoryBar";
import { bytes, count, duration, percent, seconds, shortUri } from "../lib/format";
import { type Since, SINCE, type Filters, isFiltered, listPath, matches, readFilters } from "../lib/filters";
import { useNow, useResource } from "../lib/resource";
import { Link, href, navigate, setQuery, usePlace } from "../lib/router";
import { StateIcon } from "../ui/icons";
import { Bar, Copy, Loading, ProblemNotice, StateBadge, TableScroll, Time, ViewBar } from "../ui/parts";

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

interface PollMarkProps {
  isLost: boolean;
  updatedAt: number | null;
  now: number;
}

/** Whether what is shown is what is. */
export function PollMark({ isLost, updatedAt, now }: PollMarkProps) {
  const seconds = updatedAt === null ? null : Math.max(0, Math.round((now - updatedAt) / 1000));
  if (isLost) {
    return (
      <span class="live lost" role="status">
        Connection lost{seconds === null ? "" : `; this is ${seconds} s old`}
      </span>
    );
  }
  return <span class="live">{seconds === null ? "" : `updated ${seconds} s ago`}</span>;
}

function FilterBar({ filters, counts }: { filters: Filters; counts: JobCounts | null }) {
  const toggle = (state: JobState) => {
    const states = filters.states.includes(state)
      ? filters.states.filter((item) => item !== state)
      : [...filters.states, state];
    setQuery({ state: states });
  };
  return (
    <div class="filters" role="search">
      <div class="row" role="group" aria-label="States">
        {JOB_STATES.map((state) => (
          <button
            key={state}
            type="button"
            class={`chip toggle s-${state}`}
            aria-pressed={filters.states.includes(state)}
            onClick={() => toggle(state)}
          >
            <span class="state">
              <StateIcon state={state} />
            </span>
            {state} <b class="num">{counts ? count(counts.counts[state]) : "–"}</b>
          </button>
        ))}
      </div>
      <div class="row">
        <label>
          <span class="visually-hidden">Method</span>
          <input
            class="input short"
            placeholder="method"
            value={filters.method}
            onChange={(event) => setQuery({ method: event.currentTarget.value.trim() })}
          />
        </label>
        <label>
          <span class="visually-hidden">Created</span>
          <select
            class="input"
            value={filters.since}
            onChange={(event) => setQuery({ since: event.currentTarget.value })}
          >
            {(Object.keys(SINCE) as Since[]).map((key) => (
              <option key={key} value={key}>
                {SINCE[key]}
              </option>
            ))}
          </select>
        </label>
        <label class="grow">
          <span class="visually-hidden">Search in what is listed</span>
          <input
            class="input"
            type="search"
            placeholder="search id, model, output, label"
            value={filters.text}
            onInput={(event) => setQuery({ q: event.currentTarget.value })}
          />
        </label>
        {filters.labels.map(([name, value]) => (
          <button
            key={name}
            type="button"
            class="chip"
            onClick={() => setQuery({ [`label.${name}`]: null })}
          >
            {name}={value} ×<span class="visually-hidden"> remove this filter</span>
          </button>
        ))}
      </div>
    </div>
  );
}

interface JobTableProps {
  jobs: Job[];
  now: number;
  selected: string[];
  onSelect: (ids: string[]) => void;
}

function JobTable({ jobs, now, selected, onSelect }: JobTableProps) {
  const toggle = (id: string) =>
    onSelect(selected.includes(id) ? selected.filter((item) => item !== id) : [...selected, id]);
  return (
    <TableScroll label="Jobs" class="card jobs">
        <thead>
          <tr>
            <th>
              <span class="visually-hidden">Select for comparing</span>
            </th>
            <th>State</th>
            <th>Output</th>
            <th>Method</th>
            <th>Experts</th>
            <th>Progress</th>
            <th class="num-col">Bytes</th>
            <th class="num-col">Time</th>
            <th>Created</th>
          </tr>
        </thead>
        <tbody>
          {jobs.map((job) => (
            <JobRow
              key={job.id}
              job={job}
              now={now}
              isSelected={selected.includes(job.id)}
              onToggle={() => toggle(job.id)}
            />
          ))}
        </tbody>
      </TableScroll>
  );
}

interface JobRowProps {
  job: Job;
  now: number;
  isSelected: boolean;
  onToggle: () => void;
}

function JobRow({ job, now, isSelected, onToggle }: JobRowProps) {
  const experts = job.inputs.filter((input) => input.role === "expert");
  const took = seconds(job.started_at, job.finished_at, now);
  const { bytes_done, bytes_total } = job.progress;
  return (
    <tr class={`s-${job.state}`}>
      <td>
        <input
          type="checkbox"
          checked={isSelected}
          onChange={onToggle}
          aria-label={`Compare ${job.id}`}
        />
      </td>
      <td>
        <StateBadge state={job.state} />
      </td>
      <td class="wide">
        <Link to={href(`jobs/${job.id}`)} title={job.output_uri}>
          {shortUri(job.output_uri)}
        </Link>
        <div class="muted mono ellipsis" title={job.error?.detail ?? job.id}>
          {job.error ? job.error.code : job.id}
          {Object.entries(job.labels).map(([name, value]) => (
            <button
              key={name}
              type="button"
              class="chip"
              onClick={() => setQuery({ [`label.${name}`]: value })}
            >
              {name}={value}
            </button>
          ))}
        </div>
      </td>
      <td class="mono">{job.method}</td>
      <td title={experts.map((input) => input.uri).join("\n")}>
        <div class="ellipsis experts">{experts.map((input) => shortUri(input.uri)).join(", ")}</div>
      </td>
      <td class="progress-cell">
        <Bar done={bytes_done} total={bytes_total} label={`Progress of ${job.id}`} />
        <span class="muted num">{bytes_total ? percent(bytes_done / bytes_total) : "not planned"}</span>
      </td>
      <td class="num-col">{bytes_total ? bytes(bytes_total) : "–"}</td>
      <td class="num-col">{took === null ? "–" : duration(took)}</td>
      <td class="muted">
        <Time at={job.created_at} now={now} />
      </td>
    </tr>
  );
}

const EXAMPLE = `mergeyard submit recipe.yaml --output ./merged --watch`;

function NoJobs({ filters }: { filters: Filters }) {
  if (isFiltered(filters)) {
    return (
      <div class="card empty">
        <p>No job fits these filters.</p>
        <p>
          <Link to={href("jobs")}>Show all jobs</Link>
        </p>
      </div>
    );
  }
  const base = new URL(href(""), location.origin).href.replace(/\/$/, "");
  const curl = `curl '${base}/v1/jobs' \\
  -H "Authorization: Bearer $MERGEYARD_TOKEN" -H 'Content-Type: application/json' \\
  -d '{
    "recipe": {
      "merge_method": "swudi_a",
      "base_model": "/models/base",
      "models": [{"model": "/models/chat"}, {"model": "/models/code"}]
    },
    "output_uri": "/models/merged"
  }'`;
  return (
    <div class="card empty stack">
      <p>No job yet. Submit one from a shell,</p>
      <pre class="code">{EXAMPLE}</pre>
      <p>
        or over HTTP <Copy text={curl} label="Copy the command" />
      </p>
      <pre class="code">{curl}</pre>
      <p>
        or <Link to={href("new")}>write a recipe here</Link>.
      </p>
    </div>
  );
}
