import { useMemo, useState } from "preact/hooks";

import type { Report, ReportTensor } from "../../api/types";
import { Plot } from "../../charts/Plot";
import { bytes, count, digits, duration, flops, percent, shortUri } from "../../lib/format";
import { byLayer } from "../../lib/report";
import { Link, href, setQuery, usePlace } from "../../lib/router";
import { Card, TableScroll } from "../../ui/parts";
import type { TabProps } from "../Job";
import { Figure } from "./Overview";
import { Digest } from "./Recipe";

const EXPERT_INKS = ["accent", "publishing", "cancelling", "failed", "succeeded", "queued"];

export function ReportTab({ job, report: whole }: TabProps) {
  const { query } = usePlace();
  const variants = whole?.variants ?? [];
  const report = variants.find(({ variant }) => variant === query.get("variant")) ?? variants[0] ?? whole;
  if (!report) {
    return (
      <p class="empty">
        {job.state === "succeeded" ? "Reading the report …" : "A job has a report once it has succeeded."}
      </p>
    );
  }
  return (
    <div class="stack">
      {variants.length > 0 && <Variants jobId={job.id} variants={variants} shown={report} />}
      <Totals report={report} />
      <LayerCharts report={report} />
      <div class="columns">
        <Card title="Time by stage" aside="sums over shards">
          <Stages report={report} />
        </Card>
        <Card title="Output" aside={<Digest digest={report.output.digest} />} flush>
          <Files report={report} />
        </Card>
      </div>
      <Tensors tensors={report.tensors} />
      <Card title="Made with">
        <p class="mono break">
          {Object.entries(report.versions)
            .map(([name, version]) => `${name} ${version}`)
            .join(" · ")}
        </p>
        <p class="muted">on {report.devices.join(", ")}</p>
      </Card>
    </div>
  );
}

/** The merges of a sweep; what is below is of the one that is chosen. */
function Variants({ jobId, variants, shown }: { jobId: string; variants: Report[]; shown: Report }) {
  return (
    <Card
      title={`${variants.length} variants`}
      aside={
        <>
          <span>what follows is of the chosen one</span>
          <Link to={href("compare", { job: jobId })}>compare them</Link>
        </>
      }
      flush
    >
      <TableScroll label="Variants">
        <thead>
          <tr>
            <th>Variant</th>
            <th>Method</th>
            <th class="num-col">Interference removed</th>
            <th class="num-col">Written</th>
            <th>Digest</th>
          </tr>
        </thead>
        <tbody>
          {variants.map((item) => (
            <tr key={item.variant}>
              <td>
                <button
                  type="button"
                  class="button small"
                  aria-pressed={item === shown}
                  onClick={() => setQuery({ variant: item.variant ?? null })}
                >
                  {item.variant}
                </button>
              </td>
              <td class="mono">{item.method}</td>
              <td class="num-col">
                {item.totals.interference_removed === null ? "–" : percent(item.totals.interference_removed, 2)}
              </td>
              <td class="num-col">{bytes(item.output.bytes)}</td>
              <td>
                <Digest digest={item.output.digest} />
              </td>
            </tr>
          ))}
        </tbody>
      </TableScroll>
    </Card>
  );
}

function Totals({ report }: { report: Report }) {
  const { totals } = report;
  return (
    <Card title="What came out">
      <dl class="figures">
        {totals.interference_removed !== null && (
          <Figure name="Interference removed" value={percent(totals.interference_removed, 1)} />
        )}
        <Figure name="Tensors solved" value={`${count(totals.layers_solved)} of ${count(totals.tensors)}`} />
        <Figure name="Written" value={bytes(report.output.bytes)} />
        <Figure name="Read" value={bytes(report.bytes_read)} />
        <Figure name="Ranged reads" value={count(report.read_requests)} />
        <Figure name="Arithmetic" value={flops(totals.flops)} />
        <Figure name="Peak of buffers" value={bytes(report.peak_buffer_bytes)} />
      </dl>
    </Card>
  );
}

function LayerCharts({ report }: { report: Report }) {
  const figures = useMemo(() => byLayer(report.tensors), [report]);
  if (figures.layers.length === 0) {
    return <p class="notice">This method solves no problem per layer, so there is no interference to show.</p>;
  }
  const experts = report.inputs.filter((input) => input.role === "expert");
  const hasLoss = figures.lossBefore.some((value) => value !== null);
  return (
    <div class="columns">
      {hasLoss && (
        <Card title="Interference by layer" aside="of the plain sum, and of the merge; logarithmic">
          <Plot
            label={`Interference of each of ${figures.layers.length} layers before and after`}
            x={figures.layers}
            lines={[
              { label: "before", values: positive(figures.lossBefore), ink: "queued", dash: [5, 4], points: true },
              { label: "after", values: positive(figures.lossAfter), ink: "accent", points: true },
            ]}
            format={digits}
            xIs="layer"
            isLogarithmic
          />
        </Card>
      )}
      <Card title="Norms of task vectors" aside="each expert's weights minus the base's, by layer">
        <Plot
          label="Norm of each expert's task vector by layer"
          x={figures.layers}
          lines={figures.expertNorms.map((values, index) => ({
            label: experts[index] ? shortUri(experts[index].uri) : `expert ${index + 1}`,
            values,
            ink: EXPERT_INKS[index % EXPERT_INKS.length]!,
            ...(index >= EXPERT_INKS.length ? { dash: [3, 3] } : {}),
          }))}
          format={digits}
          xIs="layer"
        />
      </Card>
    </div>
  );
}

/** A logarithmic axis has no zero. */
function positive(values: (number | null)[]): (number | null)[] {
  return values.map((value) => (value !== null && value > 0 ? value : null));
}

function Stages({ report }: { report: Report }) {
  const { seconds, busy_seconds: busy, estimate } = report;
  const rows: [string, number, boolean][] = [
    ["waiting for input", seconds.fetch ?? 0, true],
    ["solving", seconds.solve ?? 0, false],
    ["waiting for output", seconds.write ?? 0, true],
    ["reading, meanwhile", busy.read ?? 0, false],
    ["writing, meanwhile", busy.write ?? 0, false],
  ];
  const longest = Math.max(...rows.map(([, time]) => time), 1e-9);
  return (
    <>
      <div class="stages">
        {rows.map(([name, time, isIdle]) => (
          <>
            <span>{name}</span>
            <i class={isIdle ? "idle" : ""} style={{ width: `${(time / longest) * 100}%` }} />
            <span class="num right">{duration(time)}</span>
          </>
        ))}
      </div>
      {estimate?.total !== undefined && (
        <p class="muted">
          {duration(seconds.total ?? 0)} in all shards together; {duration(estimate.total)} were expected.
        </p>
      )}
    </>
  );
}

function Files({ report }: { report: Report }) {
  return (
    <TableScroll label="Output files" class="files">
        <thead>
          <tr>
            <th>File</th>
            <th class="num-col">Size</th>
            <th>SHA-256</th>
          </tr>
        </thead>
        <tbody>
          {report.output.files.map((file) => (
            <tr key={file.name}>
              <td class="mono">{file.name}</td>
              <td class="num-col">{bytes(file.size)}</td>
              <td>
                <Digest digest={file.sha256} />
              </td>
            </tr>
          ))}
        </tbody>
      </TableScroll>
  );
}

const MOST = 200;

function Tensors({ tensors }: { tensors: readonly ReportTensor[] }) {
  const [text, setText] = useState("");
  const found = tensors.filter((tensor) => `${tensor.name} ${tensor.role} ${tensor.method}`.includes(text));
  return (
    <Card
      title={`${count(found.length)} tensors`}
      flush
      aside={
        <input
          class="input"
          type="search"
          placeholder="name, role or method"
          aria-label="Search tensors"
          value={text}
          onInput={(event) => setText(event.currentTarget.value)}
        />
      }
    >
      <TableScroll label="Tensors" class="files">
          <thead>
            <tr>
              <th>Tensor</th>
              <th>Method</th>
              <th class="num-col">Shape</th>
              <th class="num-col">Interference before</th>
              <th class="num-col">after</th>
              <th class="num-col">removed</th>
              <th class="num-col">Solved in</th>
            </tr>
          </thead>
          <tbody>
            {found.slice(0, MOST).map((tensor) => (
              <tr key={tensor.name}>
                <td class="mono break">{tensor.name}</td>
                <td class="mono">{tensor.method}</td>
                <td class="num-col">{tensor.shape.join(" × ")}</td>
                <td class="num-col">{figure(tensor.loss_before)}</td>
                <td class="num-col">{figure(tensor.loss_after)}</td>
                <td class="num-col">
                  {tensor.interference_removed === undefined ? "–" : percent(tensor.interference_removed, 1)}
                </td>
                <td class="num-col">{duration(tensor.seconds)}</td>
              </tr>
            ))}
          </tbody>
        </TableScroll>
      {found.length > MOST && <p class="muted body">The first {MOST}; search for others.</p>}
    </Card>
  );
}

function figure(value: number | undefined): string {
  return value === undefined ? "–" : digits(value);
}
