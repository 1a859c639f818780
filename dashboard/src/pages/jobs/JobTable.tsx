import type { Job } from "../../api/types";
import { bytes, duration, percent, seconds, shortUri } from "../../lib/format";
import { Link, href, setQuery } from "../../lib/router";
import { Bar, StateBadge, TableScroll, Time } from "../../ui/parts";

interface JobTableProps {
  jobs: Job[];
  now: number;
  selected: string[];
  onSelect: (ids: string[]) => void;
}

export function JobTable({ jobs, now, selected, onSelect }: JobTableProps) {
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
      <td class="mono">{job.methods.join(", ")}</td>
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
