/** What stands above every tab of a job. */

import { useMemo } from "preact/hooks";

import type { JobDetail, JobPlan, Phase, Problem } from "../../api/types";
import { bytes, count, dateTime, duration, percent, rate, seconds } from "../../lib/format";
import { concerns, firstSentence, phaseName, remedy, shortPhaseName } from "../../lib/words";
import type { JobView } from "../../live/fold";
import { currentRate, remaining } from "../../live/rates";
import { Bar, Copy } from "../../ui/parts";

interface ProgressCardProps {
  job: JobDetail;
  view: JobView;
  version: number;
  plan: JobPlan | null;
  now: number;
}

export function ProgressCard({ job, view, version, plan, now }: ProgressCardProps) {
  const progress = job.progress;
  const isMoving = job.state === "running";
  const speed = useMemo(() => (isMoving ? currentRate(view.samples, now) : null), [version, now, isMoving]);
  const left = useMemo(
    () => (isMoving ? remaining(view.samples, progress.bytes_total, now) : null),
    [version, now, isMoving],
  );
  const took = seconds(job.started_at, job.finished_at, now);
  const { bytes_done, bytes_total } = progress;
  return (
    <section class="card" aria-label="Progress">
      <div class="body stack">
        <Bar done={bytes_done} total={bytes_total} label="Bytes read and written" isTall />
        <dl class="figures">
          <div>
            <dt>Read and written</dt>
            <dd data-testid="bytes">
              {bytes(bytes_done)}{" "}
              <small>
                of {bytes_total ? `${bytes(bytes_total)}, ${percent(bytes_done / bytes_total)}` : "what the plan will say"}
              </small>
            </dd>
          </div>
          <div>
            <dt>{isMoving ? "Rate" : "Mean rate"}</dt>
            <dd>{isMoving ? (speed === null ? "–" : rate(speed)) : meanRate(job, bytes_done)}</dd>
          </div>
          {!job.is_terminal && (
            <div>
              <dt>Remaining</dt>
              <dd>{remainingWords(left, plan, isMoving)}</dd>
            </div>
          )}
          <div>
            <dt>Tensors</dt>
            <dd>
              {count(progress.tensors_done)} <small>of {count(progress.tensors_total)}</small>
            </dd>
          </div>
          <div>
            <dt>Shards</dt>
            <dd>
              {count(progress.shards_done)} <small>of {count(progress.shards_total)}</small>
            </dd>
          </div>
          <div>
            <dt>Time</dt>
            <dd title={job.started_at ? `since ${dateTime(job.started_at)}` : "not started"}>
              {took === null ? "–" : duration(took)}
            </dd>
          </div>
          <div>
            <dt>Method</dt>
            <dd class="mono">{job.methods.join(", ")}</dd>
          </div>
        </dl>
      </div>
    </section>
  );
}

function meanRate(job: JobDetail, done: number): string {
  const merging = job.phases.find((phase) => phase.name === "merging");
  const took = merging ? seconds(merging.started_at, merging.finished_at, Date.now()) : null;
  return took ? rate(done / Math.max(took, 0.1)) : "–";
}

function remainingWords(
  left: ReturnType<typeof remaining>,
  plan: JobPlan | null,
  isMoving: boolean,
): preact.ComponentChildren {
  if (left) {
    return left.isRough ? (
      <>
        {duration(left.seconds)} <small>or so</small>
      </>
    ) : (
      duration(left.seconds)
    );
  }
  if (plan?.estimate && !isMoving) return <>{duration(plan.estimate.total_seconds)} <small>planned</small></>;
  return <small>too early to say</small>;
}

interface PhasesProps {
  phases: readonly Phase[];
  now: number;
  /** The last one did not come to its end: the job failed or was cancelled in it. */
  isBroken: boolean;
}

export function Phases({ phases, now, isBroken }: PhasesProps) {
  if (phases.length === 0) return null;
  const times = phases.map((phase) => seconds(phase.started_at, phase.finished_at, now) ?? 0);
  const total = Math.max(times.reduce((sum, time) => sum + time, 0), 0.001);
  return (
    <ol class="phases" aria-label="Phases">
      {phases.map((phase, index) => (
        <li
          key={phase.started_at + phase.name}
          class={phase.finished_at && !(isBroken && index === phases.length - 1) ? "done" : "now"}
          style={{ flexGrow: String(Math.max((times[index] ?? 0) / total, 0.02) * 20) }}
          title={`${phaseName(phase.name)}: from ${dateTime(phase.started_at)}${phase.message ? `, ${phase.message}` : ""}`}
        >
          <b>{shortPhaseName(phase.name)}</b>
          <span class="num">{duration(times[index] ?? 0)}</span>
        </li>
      ))}
    </ol>
  );
}

export function ErrorCard({ problem }: { problem: Problem }) {
  return (
    <section class="notice bad stack" role="alert" data-testid="error-card" aria-label="Why it failed">
      <div class="row spread">
        <h2>{problem.title}</h2>
        <span class="row">
          <code>{problem.code}</code>
          <Copy text={JSON.stringify(problem, null, 2)} label="Copy the problem as JSON" />
        </span>
      </div>
      <p class="break">{firstSentence(problem.detail)}</p>
      <dl class="facts">
        {concerns(problem).map(([label, value]) => (
          <>
            <dt>{label}</dt>
            <dd class="mono break">{value}</dd>
          </>
        ))}
        <dt>What to do</dt>
        <dd class="break">{remedy(problem)}</dd>
        {problem.request_id && (
          <>
            <dt>Request</dt>
            <dd class="mono break">{problem.request_id}</dd>
          </>
        )}
      </dl>
      {problem.errors && problem.errors.length > 1 && (
        <details>
          <summary>All {problem.errors.length} faults</summary>
          <ul>
            {problem.errors.map((fault) => (
              <li key={fault.pointer + fault.detail} class="break">
                <code>{fault.pointer}</code> {fault.detail}
              </li>
            ))}
          </ul>
        </details>
      )}
    </section>
  );
}

export function Warnings({ warnings, more }: { warnings: readonly string[]; more: readonly string[] }) {
  const all = [...new Set([...warnings, ...more])];
  if (all.length === 0) return null;
  return (
    <div class="notice">
      <b>{all.length === 1 ? "A warning" : `${all.length} warnings`}</b>
      <ul>
        {all.map((text) => (
          <li key={text} class="break">
            {text}
          </li>
        ))}
      </ul>
    </div>
  );
}
