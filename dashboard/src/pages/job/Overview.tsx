import { useMemo } from "preact/hooks";

import { Gantt } from "../../charts/Gantt";
import { LayerMap } from "../../charts/LayerMap";
import { Plot } from "../../charts/Plot";
import { bytes, flops, percent, plural, rate } from "../../lib/format";
import type { JobView } from "../../live/fold";
import { throughput } from "../../live/rates";
import { Card } from "../../ui/parts";
import type { TabProps } from "../Job";

export function Overview({ job, view, version, plan, report, now }: TabProps) {
  const figures = useMemo(() => {
    if (!report) return null;
    const known = report.tensors.filter((tensor) => tensor.interference_removed !== undefined);
    return new Map(known.map((tensor) => [tensor.name, tensor.interference_removed!]));
  }, [report]);
  const ticking = job.is_terminal ? 0 : now;
  const removed = report?.totals.interference_removed;
  return (
    <div class="stack">
      <Card
        title="Layers"
        aside={removed === null || removed === undefined ? undefined : `${percent(removed, 1)} of interference removed, mean over ${plural(report!.totals.layers_solved, "solved tensor")}`}
      >
        {plan ? (
          <LayerMap layout={plan.layout} view={view} version={version} figures={figures} />
        ) : (
          <p class="muted">The map is drawn from the plan, which is made once headers are read.</p>
        )}
      </Card>
      <Card title="Shards over time">
        {view.tries.length > 0 ? (
          <Gantt tries={view.tries} version={version} now={ticking} />
        ) : (
          <p class="muted">No worker has taken up a shard yet.</p>
        )}
      </Card>
      <div class="columns">
        <ThroughputCard view={view} version={version} />
        <MemoryCard view={view} version={version} plan={plan} />
      </div>
      {plan && (
        <Card title="Plan">
          <dl class="figures">
            <Figure name="To read" value={bytes(plan.bytes_read)} />
            <Figure name="To write" value={bytes(plan.bytes_written)} />
            <Figure name="Arithmetic" value={flops(plan.flops)} />
            <Figure name="Largest problem, host" value={bytes(plan.max_host_bytes)} />
            <Figure name="Largest problem, device" value={bytes(plan.max_device_bytes)} />
            <Figure name="Memory budget" value={bytes(plan.memory_budget)} />
            {Object.entries(plan.tensors_by_method).map(([method, number]) => (
              <Figure key={method} name={`by ${method}`} value={plural(number, "tensor")} />
            ))}
          </dl>
        </Card>
      )}
    </div>
  );
}

export function Figure({ name, value }: { name: string; value: string }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{value}</dd>
    </div>
  );
}

function ThroughputCard({ view, version }: { view: JobView; version: number }) {
  const series = useMemo(() => throughput(view.samples), [version, view]);
  return (
    <Card title="Throughput" aside="bytes read and written a second">
      {series.times.length > 1 ? (
        <Plot
          label={`Throughput over time, at most ${rate(Math.max(...series.bytesPerSecond.map((value) => value ?? 0)))}`}
          x={series.times}
          lines={[{ label: "throughput", values: series.bytesPerSecond, ink: "accent", fill: true }]}
          format={rate}
          xIs="time"
        />
      ) : (
        <p class="muted">Too short to be drawn: progress is told about once a second.</p>
      )}
    </Card>
  );
}

interface MemoryCardProps {
  view: JobView;
  version: number;
  plan: TabProps["plan"];
}

/** Measured by each shard's receipt, against what the plan allows. */
function MemoryCard({ view, version, plan }: MemoryCardProps) {
  const points = useMemo(() => {
    const done = view.tries.filter((item) => item.outcome === "succeeded" && item.finishedAt !== null);
    return done
      .map((item) => ({
        time: item.finishedAt! / 1000,
        peak: view.shards.get(item.shard)?.receipt?.peak_buffer_bytes ?? null,
      }))
      .sort((a, b) => a.time - b.time);
  }, [version, view]);
  const peak = Math.max(0, ...points.map((point) => point.peak ?? 0));
  return (
    <Card title="Memory" aside={peak > 0 ? `peak of tensor buffers ${bytes(peak)}` : "tensor buffers of each shard"}>
      {points.length > 0 && plan ? (
        <Plot
          label={`Peak buffers of each shard, at most ${bytes(peak)} of a budget of ${bytes(plan.memory_budget)}`}
          x={points.map((point) => point.time)}
          lines={[
            { label: "peak", values: points.map((point) => point.peak), ink: "publishing", points: true },
            {
              label: "largest problem, planned",
              values: points.map(() => plan.max_host_bytes),
              ink: "cancelling",
              dash: [5, 4],
            },
          ]}
          format={bytes}
          xIs="time"
        />
      ) : (
        <p class="muted">Shown as shards are published; each tells its peak.</p>
      )}
    </Card>
  );
}
