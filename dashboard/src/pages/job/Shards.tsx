import { useState } from "preact/hooks";

import { bytes, count, duration, percent } from "../../lib/format";
import type { ShardView } from "../../live/fold";
import { Bar, Card, TableScroll } from "../../ui/parts";
import type { TabProps } from "../Job";

const STEP = 100;

export function ShardsTab({ view, plan }: TabProps) {
  const [most, setMost] = useState(STEP);
  const [only, setOnly] = useState("");
  if (!plan) return <p class="empty">Shards are known once the job is planned.</p>;
  const rows = plan.files
    .map((file, index) => ({ file, index, shard: view.shards.get(index) }))
    .filter(({ shard }) => fits(shard, only));
  const tries = new Map(view.tries.map((item) => [item.shard, item]));
  return (
    <Card
      title={`${count(rows.length)} of ${count(plan.files.length)} shards`}
      flush
      aside={
        <select
          class="input"
          aria-label="Which shards"
          value={only}
          onChange={(event) => setOnly(event.currentTarget.value)}
        >
          <option value="">all</option>
          <option value="running">in work</option>
          <option value="pending">waiting</option>
          <option value="succeeded">published</option>
          <option value="retried">tried again</option>
          <option value="failed">failed</option>
        </select>
      }
    >
      <TableScroll label="Shards">
          <thead>
            <tr>
              <th class="num-col">#</th>
              <th>File</th>
              <th>State</th>
              <th>Tensors written</th>
              <th class="num-col">Size</th>
              <th class="num-col">To read</th>
              <th class="num-col">Time</th>
              <th class="num-col">Interference removed</th>
              <th>Worker</th>
            </tr>
          </thead>
          <tbody>
            {rows.slice(0, most).map(({ file, index, shard }) => {
              const done = shard?.state === "succeeded" ? file.tensors : (shard?.written ?? 0);
              const took = shard?.receipt?.seconds.total;
              return (
                <tr key={index} class={`s-${shard?.state === "pending" ? "queued" : (shard?.state ?? "queued")}`}>
                  <td class="num-col">{index}</td>
                  <td class="mono nowrap">{file.name}</td>
                  <td>
                    <span class="state">{stateWord(shard)}</span>
                    {shard?.error && (
                      <div class="muted break" title={shard.error.detail}>
                        <code>{shard.error.code}</code>
                      </div>
                    )}
                  </td>
                  <td class="progress-cell">
                    <Bar done={done} total={file.tensors} label={`Tensors of shard ${index}`} />
                    <span class="num muted">
                      {done} / {file.tensors}
                    </span>
                  </td>
                  <td class="num-col">{bytes(file.size)}</td>
                  <td class="num-col">{bytes(file.bytes_read)}</td>
                  <td class="num-col">{took === undefined ? "–" : duration(took)}</td>
                  <td class="num-col">{meanRemoved(shard)}</td>
                  <td class="mono nowrap">{shard?.receipt?.worker ?? tries.get(index)?.worker ?? "–"}</td>
                </tr>
              );
            })}
          </tbody>
        </TableScroll>
      {rows.length > most && (
        <p class="row body">
          <button type="button" class="button" onClick={() => setMost(most + STEP)}>
            {Math.min(STEP, rows.length - most)} more
          </button>
        </p>
      )}
    </Card>
  );
}

function fits(shard: ShardView | undefined, only: string): boolean {
  if (only === "") return true;
  if (only === "retried") return (shard?.retries ?? 0) > 0;
  return (shard?.state ?? "pending") === only;
}

function stateWord(shard: ShardView | undefined): string {
  const words = { pending: "waiting", running: "in work", succeeded: "published", failed: "failed" };
  const word = words[shard?.state ?? "pending"];
  return shard?.retries ? `${word}, ${shard.retries}× tried again` : word;
}

function meanRemoved(shard: ShardView | undefined): string {
  const known = (shard?.receipt?.interference_removed ?? []).filter((share) => share !== null);
  if (known.length === 0) return "–";
  return percent(known.reduce((sum, share) => sum + share, 0) / known.length, 1);
}
