/** Shards over time, a lane for each worker; tries that were repeated are hatched and crossed. */

import { useMemo, useRef, useState } from "preact/hooks";

import { clock, duration, plural } from "../lib/format";
import { color } from "../lib/theme";
import type { ShardTry } from "../live/fold";
import { useCanvas } from "./useCanvas";

const LANE = 16;
const FOOT = 20;
const MOST_LANES = 64;

interface GanttProps {
  tries: readonly ShardTry[];
  version: number;
  now: number;
}

interface Bar {
  item: ShardTry;
  x: number;
  w: number;
  y: number;
}

export function Gantt({ tries, version, now }: GanttProps) {
  const lanes = useMemo(() => assignLanes(tries), [tries, version, tries.length]);
  const [selected, setSelected] = useState<ShardTry | null>(null);
  const bars = useRef<Bar[]>([]);
  const count = Math.min(lanes.length, MOST_LANES);
  const height = Math.max(count, 1) * LANE + FOOT;
  const canvas = useCanvas(
    height,
    (context, width) => {
      bars.current = drawGantt(context, width, lanes.slice(0, MOST_LANES), now, selected);
    },
    [lanes, version, now, selected],
  );
  const point = (event: MouseEvent) => {
    const { offsetX: x, offsetY: y } = event;
    const hit = bars.current.findLast(
      (bar) => x >= bar.x && x <= bar.x + Math.max(bar.w, 3) && y >= bar.y && y < bar.y + LANE,
    );
    setSelected(hit?.item ?? null);
  };
  const walk = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || tries.length === 0) return;
    event.preventDefault();
    const index = selected ? tries.indexOf(selected) + step : 0;
    setSelected(tries[Math.min(Math.max(index, 0), tries.length - 1)]!);
  };
  const repeated = tries.filter((item) => item.outcome === "retried").length;
  return (
    <div class="gantt">
      <canvas
        ref={canvas}
        style={{ height: `${height}px` }}
        tabIndex={0}
        role="application"
        aria-roledescription="chart of shards over time"
        aria-label={`${plural(tries.length, "try", "tries")} at shards on ${plural(lanes.length, "worker")}, ${repeated} repeated. Arrow keys walk over them.`}
        aria-describedby="gantt-words"
        onMouseMove={point}
        onMouseLeave={() => setSelected(null)}
        onKeyDown={walk}
      />
      <p id="gantt-words" class="cell-words" aria-live="polite">
        {selected ? (
          <TryWords item={selected} now={now} />
        ) : (
          <span class="muted">
            {plural(lanes.length, "worker")}
            {lanes.length > MOST_LANES && `, the first ${MOST_LANES} shown`}
            {repeated > 0 && `; ${plural(repeated, "try", "tries")} repeated`}
          </span>
        )}
      </p>
    </div>
  );
}

interface Lane {
  worker: string;
  tries: ShardTry[];
}

/** Workers in the order in which they first took something up. */
function assignLanes(tries: readonly ShardTry[]): Lane[] {
  const lanes = new Map<string, Lane>();
  for (const item of tries) {
    const lane = lanes.get(item.worker) ?? { worker: item.worker, tries: [] };
    lane.tries.push(item);
    lanes.set(item.worker, lane);
  }
  return [...lanes.values()];
}

function drawGantt(
  context: CanvasRenderingContext2D,
  width: number,
  lanes: readonly Lane[],
  now: number,
  selected: ShardTry | null,
): Bar[] {
  const all = lanes.flatMap((lane) => lane.tries);
  if (all.length === 0) return [];
  const from = Math.min(...all.map((item) => item.startedAt));
  const to = Math.max(...all.map((item) => item.finishedAt ?? now), from + 1000);
  const ink = {
    text: color("muted"),
    line: color("line"),
    running: color("running"),
    succeeded: color("succeeded"),
    failed: color("failed"),
    strong: color("text"),
    surface: color("surface"),
  };
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const left = width < 500 ? 0 : 128;
  const scale = (width - left - 2) / (to - from);
  const bottom = lanes.length * LANE;
  drawTicks(context, { from, to, left, scale, bottom, text: ink.text, line: ink.line });
  const bars: Bar[] = [];
  lanes.forEach((lane, index) => {
    const y = index * LANE;
    if (left) {
      context.fillStyle = ink.text;
      context.fillText(lane.worker || "worker", 0, y + LANE / 2, left - 8);
    }
    for (const item of lane.tries) {
      const x = left + (item.startedAt - from) * scale;
      const w = Math.max(((item.finishedAt ?? now) - item.startedAt) * scale - 1, 1.5);
      bars.push({ item, x, w, y });
      const isBad = item.outcome === "retried" || item.outcome === "failed";
      context.fillStyle = isBad ? ink.failed : item.outcome === "running" ? ink.running : ink.succeeded;
      context.globalAlpha = isBad ? 0.3 : 0.85;
      context.fillRect(x, y + 2, w, LANE - 4);
      context.globalAlpha = 1;
      if (isBad) {
        context.strokeStyle = ink.failed;
        context.lineWidth = 1.5;
        context.strokeRect(x + 0.75, y + 2.75, Math.max(w - 1.5, 0.5), LANE - 5.5);
        context.beginPath();
        context.moveTo(x + w - 1, y + 3);
        context.lineTo(x + w - 9, y + LANE - 3);
        context.moveTo(x + w - 9, y + 3);
        context.lineTo(x + w - 1, y + LANE - 3);
        context.stroke();
      } else if (w > 26) {
        context.fillStyle = ink.surface;
        context.fillText(String(item.shard), x + 4, y + LANE / 2 + 0.5);
      }
      if (item === selected) {
        context.strokeStyle = ink.strong;
        context.lineWidth = 2;
        context.strokeRect(x - 1, y + 1, w + 2, LANE - 2);
      }
    }
  });
  return bars;
}

interface Ticks {
  from: number;
  to: number;
  left: number;
  scale: number;
  bottom: number;
  text: string;
  line: string;
}

function drawTicks(context: CanvasRenderingContext2D, ticks: Ticks): void {
  const { from, to, left, scale, bottom } = ticks;
  const steps = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400];
  const step = (steps.find((seconds) => seconds * 1000 * scale >= 70) ?? 172800) * 1000;
  context.strokeStyle = ticks.line;
  context.lineWidth = 1;
  context.fillStyle = ticks.text;
  for (let elapsed = 0; elapsed <= to - from; elapsed += step) {
    const x = Math.round(left + elapsed * scale) + 0.5;
    context.beginPath();
    context.moveTo(x, 0);
    context.lineTo(x, bottom);
    context.stroke();
    context.fillText(elapsed === 0 ? clock(from) : `+${shortTime(elapsed / 1000)}`, x, bottom + FOOT / 2);
  }
}

function shortTime(seconds: number): string {
  if (seconds < 60) return `${seconds} s`;
  return seconds < 3600 ? `${seconds / 60} min` : `${seconds / 3600} h`;
}

function TryWords({ item, now }: { item: ShardTry; now: number }) {
  const took = ((item.finishedAt ?? now) - item.startedAt) / 1000;
  return (
    <>
      <b>
        Shard {item.shard}, try {item.attempt}: {item.outcome === "retried" ? "failed, tried again" : item.outcome}
      </b>{" "}
      · {duration(took)} from {clock(item.startedAt)} · <code>{item.worker}</code> on {item.device}
      {item.error && (
        <span class="break">
          {" "}
          · <code>{item.error.code}</code> {item.error.detail}
        </span>
      )}
    </>
  );
}
