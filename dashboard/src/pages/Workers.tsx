/** Machines, their devices and worker processes, and what each has in hand. */

import { get } from "../api/client";
import type { Page, Worker } from "../api/types";
import { bytes, count, duration, plural } from "../lib/format";
import { useNow } from "../lib/resource";
import { Link, href, setQuery, usePlace } from "../lib/router";
import { useLive } from "../live/useLive";
import { LiveMark } from "../ui/LiveMark";
import { Card, Loading, ProblemNotice, TableScroll, Time, ViewBar } from "../ui/parts";

const WITHIN: Record<string, string> = { "900": "15 minutes", "3600": "hour", "86400": "day", "604800": "week" };
const USUAL = "3600";

/** All that changes what a worker has in hand. */
const TYPES = ["shard.started", "shard.finished", "shard.retried", "job.state_changed", "job.forgotten"];

export function WorkersPage() {
  const { query } = usePlace();
  const asked = query.get("within") ?? USUAL;
  const within = asked in WITHIN ? asked : USUAL;
  const path = `v1/workers?within_seconds=${within}`;
  const list = useLive({
    key: path,
    read: (signal) => get<Page<Worker>>(path, signal),
    types: TYPES,
    isNews: () => true,
  });
  const now = useNow();
  return (
    <div class="stack">
      <div class="row spread">
        <h1>Workers</h1>
        <div class="row">
          <LiveMark live={list.live} now={now} />
          <ViewBar path={path} />
          <label class="row">
            <span class="label">Seen in the last</span>
            <select class="input" value={within} onChange={(event) => setQuery({ within: event.currentTarget.value })}>
              {Object.entries(WITHIN).map(([value, label]) => (
                <option key={value} value={value}>
                  {label}
                </option>
              ))}
            </select>
          </label>
        </div>
      </div>
      {list.problem && <ProblemNotice problem={list.problem} />}
      {!list.data && !list.problem && <Loading what="the workers" />}
      {list.data && <Nodes workers={list.data.data} now={now} />}
    </div>
  );
}

function Nodes({ workers, now }: { workers: Worker[]; now: number }) {
  if (workers.length === 0) {
    return (
      <p class="card empty">
        No worker has had a shard in this time. Workers are started with the first job and known by the shards that
        they take up.
      </p>
    );
  }
  const nodes = new Map<string, Worker[]>();
  for (const worker of workers) nodes.set(worker.node, [...(nodes.get(worker.node) ?? []), worker]);
  const busy = workers.filter((worker) => worker.is_busy).length;
  return (
    <>
      <p class="sentence">
        {plural(nodes.size, "machine")}, {plural(workers.length, "worker")}, {count(busy)} at work now.
      </p>
      {[...nodes].map(([node, members]) => (
        <Card
          key={node}
          title={<span class="mono">{node}</span>}
          aside={[...new Set(members.map((worker) => worker.device))].join(", ")}
          flush
        >
          <TableScroll label={`Workers of ${node}`}>
            <thead>
              <tr>
                <th>Worker</th>
                <th>Device</th>
                <th>Works on</th>
                <th class="num-col">For</th>
                <th class="num-col">Shards done</th>
                <th class="num-col">Bytes moved</th>
                <th>Last seen</th>
              </tr>
            </thead>
            <tbody>
              {members.map((worker) => (
                <WorkerRow key={worker.id} worker={worker} now={now} />
              ))}
            </tbody>
          </TableScroll>
        </Card>
      ))}
    </>
  );
}

function WorkerRow({ worker, now }: { worker: Worker; now: number }) {
  const { task } = worker;
  return (
    <tr>
      <td class="mono nowrap">{worker.id}</td>
      <td class="nowrap">{worker.device}</td>
      <td>
        {task ? (
          <Link to={href(`jobs/${task.job_id}`, { tab: "shards" })}>
            shard {task.shard_index} of <code>{task.job_id}</code>
          </Link>
        ) : (
          <span class="muted">idle</span>
        )}
      </td>
      <td class="num-col">{task ? duration((now - Date.parse(task.started_at)) / 1000) : "–"}</td>
      <td class="num-col">{count(worker.shards_done)}</td>
      <td class="num-col">{bytes(worker.bytes_done)}</td>
      <td>
        <Time at={worker.last_seen_at} now={now} />
      </td>
    </tr>
  );
}
