/** Two or more jobs side by side: what differs in the recipes, in the digests, and in what came out. */

import { useMemo, useState } from "preact/hooks";

import { get } from "../api/client";
import type { Job, JobDetail, Page, Report } from "../api/types";
import { type Line, Plot } from "../charts/Plot";
import { compareDocuments } from "../lib/compare";
import { bytes, count, digits, duration, flops, percent, rate, seconds, shortDigest, shortUri } from "../lib/format";
import { byLayer } from "../lib/report";
import { useNow, useResource } from "../lib/resource";
import { Link, href, setQuery, usePlace } from "../lib/router";
import { type LiveData, useLive } from "../live/useLive";
import { LiveMark } from "../ui/LiveMark";
import { Card, Loading, ProblemNotice, StateBadge, TableScroll, ViewBar } from "../ui/parts";

const MOST = 6;
const INKS = ["accent", "cancelling", "publishing", "failed", "succeeded", "queued"];

/** A column: a job, or one variant of a job that is a sweep. */
interface Compared {
  key: string;
  name: string;
  job: JobDetail;
  report: Report | null;
  /** What is compared value by value. */
  recipe: unknown;
}

export function ComparePage() {
  const { query } = usePlace();
  const ids = query.getAll("job").slice(0, MOST);
  const { data: items, problem, live } = useCompared(ids);
  const now = useNow();
  return (
    <div class="stack">
      <div class="row spread">
        <h1>Compare jobs</h1>
        <LiveMark live={live} now={now} />
      </div>
      <Picker ids={ids} />
      {problem && <ProblemNotice problem={problem} />}
      {ids.length > 0 && !items && !problem && <Loading what="the jobs" />}
      {ids.length === 0 || items?.length === 1 ? (
        <p class="empty">Choose two jobs or more, or one that is a sweep.</p>
      ) : (
        items && <Comparison items={items} />
      )}
    </div>
  );
}

function useCompared(ids: string[]): LiveData<Compared[]> {
  return useLive({
    key: ids.join(" "),
    read: async (signal) => (await Promise.all(ids.map((id) => readOne(id, signal)))).flat().slice(0, MOST),
    types: ["job.state_changed", "job.finished"],
    isNews: (event) => event.job_id !== null && ids.includes(event.job_id),
  });
}

/** A job, or every variant of one that is a sweep. */
async function readOne(id: string, signal: AbortSignal): Promise<Compared[]> {
  const job = await get<JobDetail>(`v1/jobs/${id}`, signal);
  const report = job.state === "succeeded" ? await get<Report>(`v1/jobs/${id}/report`, signal) : null;
  const name = shortUri(job.output_uri);
  const { sweep, ...recipe } = job.recipe as { sweep?: { name: string }[] };
  if (!report?.variants) {
    return [{ key: id, name, job, report, recipe: { ...job.recipe, options: job.options } }];
  }
  return report.variants.map((variant) => ({
    key: `${id}/${variant.variant}`,
    name: `${name}/${variant.variant}`,
    job,
    report: variant,
    recipe: {
      ...recipe,
      options: job.options,
      variant: sweep?.find((entry) => entry.name === variant.variant),
    },
  }));
}

function Picker({ ids }: { ids: string[] }) {
  const recent = useResource<Page<Job>>("v1/jobs?limit=100");
  const others = (recent.data?.data ?? []).filter((job) => !ids.includes(job.id));
  return (
    <div class="row">
      {ids.map((id) => (
        <button
          key={id}
          type="button"
          class="chip"
          onClick={() => setQuery({ job: ids.filter((other) => other !== id) })}
        >
          {shortUri(recent.data?.data.find((job) => job.id === id)?.output_uri ?? id)} ×
          <span class="visually-hidden"> take out of the comparison</span>
        </button>
      ))}
      {ids.length < MOST && (
        <select
          class="input picker"
          aria-label="Add a job"
          value=""
          onChange={(event) => setQuery({ job: [...ids, event.currentTarget.value] })}
        >
          <option value="">add a job …</option>
          {others.map((job) => (
            <option key={job.id} value={job.id}>
              {shortUri(job.output_uri)}, {job.methods.join(", ")}, {job.state}
            </option>
          ))}
        </select>
      )}
    </div>
  );
}

function Comparison({ items }: { items: Compared[] }) {
  return (
    <div class="stack">
      <FiguresTable items={items} />
      <LayersCard items={items} />
      <RecipeTable items={items} />
    </div>
  );
}

type Value = string | null;

interface FigureRow {
  name: string;
  values: Value[];
  /** Say whether the values are the same: of interest for digests. */
  isDigest?: boolean;
}

function figureRows(items: Compared[]): FigureRow[] {
  const each = (value: (item: Compared) => Value): Value[] => items.map(value);
  const took = ({ job }: Compared) => seconds(job.started_at, job.finished_at, Date.now());
  const ofReport = (value: (report: Report) => Value) => each(({ report }) => report && value(report));
  return [
    { name: "Method", values: each(({ job, report }) => (report?.variant ? report.method : job.methods.join(", "))) },
    { name: "Output digest", isDigest: true, values: ofReport((report) => report.output.digest) },
    { name: "Recipe digest", isDigest: true, values: each(({ job }) => job.recipe_digest) },
    { name: "Plan digest", isDigest: true, values: each(({ job }) => job.plan_digest) },
    {
      name: "Inputs",
      isDigest: true,
      values: each(({ job }) => job.inputs.map((input) => input.digest).join(" ") || null),
    },
    { name: "Time", values: each((item) => { const time = took(item); return time === null ? null : duration(time); }) },
    { name: "Moved", values: each(({ job }) => bytes(job.progress.bytes_done)) },
    {
      name: "Mean rate",
      values: each((item) => { const time = took(item); return time ? rate(item.job.progress.bytes_done / time) : null; }),
    },
    { name: "Written", values: ofReport((report) => bytes(report.output.bytes)) },
    {
      name: "Interference removed",
      values: ofReport(({ totals }) =>
        totals.interference_removed === null ? null : percent(totals.interference_removed, 2),
      ),
    },
    { name: "Tensors solved", values: ofReport(({ totals }) => `${count(totals.layers_solved)} of ${count(totals.tensors)}`) },
    { name: "Arithmetic", values: ofReport(({ totals }) => flops(totals.flops)) },
    { name: "Solving, all shards", values: ofReport((report) => duration(report.seconds.solve ?? 0)) },
    { name: "Peak of buffers", values: ofReport((report) => bytes(report.peak_buffer_bytes)) },
    { name: "Shards", values: each(({ job }) => count(job.progress.shards_total)) },
    { name: "Attempts", values: each(({ job }) => count(job.attempt)) },
  ];
}

function FiguresTable({ items }: { items: Compared[] }) {
  return (
    <TableScroll label="Figures" class="card compare">
        <thead>
          <tr>
            <th>
              <span class="visually-hidden">Figure</span>
            </th>
            {items.map(({ key, name, job }) => (
              <th key={key} scope="col">
                <div class="row">
                  <Link to={href(`jobs/${job.id}`)}>{name}</Link>
                  <StateBadge state={job.state} />
                </div>
                <ViewBar path={`v1/jobs/${job.id}`} />
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {figureRows(items).map(({ name, values, isDigest }) => (
            <tr key={name}>
              <th scope="row">
                {name}
                {isDigest && values.every((value) => value !== null) && (
                  <b class={allSame(values) ? "same" : "other"}>{allSame(values) ? " = equal" : " ≠ different"}</b>
                )}
              </th>
              {values.map((value, index) => (
                <td key={items[index]!.key} class={isDigest ? "mono" : "num"} title={value ?? ""}>
                  {value === null ? "–" : isDigest ? value.split(" ").map(shortDigest).join(" ") : value}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </TableScroll>
  );
}

function allSame(values: Value[]): boolean {
  return values.every((value) => value === values[0]);
}

function LayersCard({ items }: { items: Compared[] }) {
  const chart = useMemo(() => {
    const solved = items
      .map(({ name, report }, index) => ({ name, index, figures: byLayer(report?.tensors ?? []) }))
      .filter(({ figures }) => figures.left.some((value) => value !== null));
    const layers = [...new Set(solved.flatMap(({ figures }) => figures.layers))].sort((a, b) => a - b);
    const lines = solved.map(({ name, index, figures }) => ({
      label: name,
      values: layers.map((layer) => figures.left[figures.layers.indexOf(layer)] ?? null),
      ink: INKS[index % INKS.length]!,
      points: true,
    }));
    const values = lines.flatMap((line) => line.values).filter((value) => value !== null && value > 0) as number[];
    return { layers, lines, isWide: Math.max(...values) > 20 * Math.min(...values) };
  }, [items]);
  if (chart.lines.length === 0) return null;
  return (
    <Card title="Interference that is left, by layer" aside={`share of the plain sum's${chart.isWide ? "; logarithmic" : ""}`}>
      <Plot
        key={chart.lines.map((line) => line.label).join()}
        label={`Share of interference left in each of ${chart.layers.length} layers, for ${chart.lines.length} merges`}
        x={chart.layers}
        lines={chart.isWide ? chart.lines.map(withoutZeros) : chart.lines}
        format={(value) => (value >= 0.001 || value === 0 ? percent(value, value < 0.1 ? 2 : 0) : digits(value))}
        xIs="layer"
        isLogarithmic={chart.isWide}
      />
    </Card>
  );
}

/** A logarithmic axis has no zero. */
function withoutZeros(line: Line): Line {
  return { ...line, values: line.values.map((value) => (value && value > 0 ? value : null)) };
}

function RecipeTable({ items }: { items: Compared[] }) {
  const [isAll, setIsAll] = useState(false);
  const rows = useMemo(() => compareDocuments(items.map(({ recipe }) => recipe)), [items]);
  const different = rows.filter((row) => !row.isSame);
  const shown = isAll ? rows : different;
  return (
    <Card
      title={different.length === 0 ? "Recipes and options are the same" : `Recipes and options differ in ${different.length} of ${rows.length} values`}
      flush
      aside={
        <label class="row">
          <input type="checkbox" checked={isAll} onChange={(event) => setIsAll(event.currentTarget.checked)} />
          also what is equal
        </label>
      }
    >
      <TableScroll label="Recipes" class="compare">
          <thead>
            <tr>
              <th scope="col">Where</th>
              {items.map(({ key, name }) => (
                <th key={key} scope="col">
                  {name}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {shown.map((row) => (
              <tr key={row.path}>
                <th scope="row" class="mono">
                  {row.path}
                  {!row.isSame && <span class="visually-hidden"> differs</span>}
                </th>
                {row.values.map((value, index) => (
                  <td key={items[index]!.key} class={row.isSame ? "mono muted" : "mono break differs"}>
                    {value ?? "–"}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </TableScroll>
    </Card>
  );
}
