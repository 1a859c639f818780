/**
 * Layers × tensor roles on one canvas. A cell fills from below as its tensors are fetched, solved
 * and uploaded; when done it takes the colour of the interference that was removed. Arrow keys walk
 * over the cells; what a cell is stands beside the map in words.
 */

import { useMemo, useRef, useState } from "preact/hooks";

import type { PlannedTensor } from "../api/types";
import { bytes, flops, percent, plural } from "../lib/format";
import { color, currentTheme } from "../lib/theme";
import type { JobView } from "../live/fold";
import { type Cell, type CellState, type Grid, cellKey, cellState, describeStage, makeGrid } from "./grid";
import { removedPlace, scaleColor } from "./scale";
import { useCanvas } from "./useCanvas";

const ROW = 20;
const HEAD = 18;
const MEANS = 48;

interface LayerMapProps {
  layout: readonly PlannedTensor[];
  view: JobView;
  version: number;
  figures: ReadonlyMap<string, number> | null;
}

interface Geometry {
  left: number;
  /** Where the means of the roles stand; the cells end before. */
  right: number;
  step: number;
  gap: number;
}

export function LayerMap({ layout, view, version, figures }: LayerMapProps) {
  const grid = useMemo(() => makeGrid(layout), [layout]);
  const [at, setAt] = useState<{ row: number; column: number } | null>(null);
  const height = HEAD + grid.roles.length * ROW + 2;
  const geometry = useRef<Geometry>({ left: 0, right: 0, step: 1, gap: 0 });
  const canvas = useCanvas(
    height,
    (context, width) => {
      geometry.current = layOut(grid, context, width);
      draw(context, grid, geometry.current, view, figures, at);
    },
    [grid, version, figures, at],
  );
  const selected = at ? (grid.cells.get(cellKey(grid.roles[at.row]!, grid.layers[at.column]!)) ?? null) : null;

  const point = (event: MouseEvent) => {
    const { left, step } = geometry.current;
    const column = Math.floor((event.offsetX - left) / step);
    const row = Math.floor((event.offsetY - HEAD) / ROW);
    const isInside = column >= 0 && column < grid.layers.length && row >= 0 && row < grid.roles.length;
    setAt(isInside ? { row, column } : null);
  };
  const walk = (event: KeyboardEvent) => {
    const move = MOVES[event.key];
    if (!move) return;
    event.preventDefault();
    const row = clamp((at?.row ?? 0) + (at ? move[0] : 0), grid.roles.length);
    const column = clamp((at?.column ?? 0) + (at ? move[1] : 0), grid.layers.length);
    setAt({ row, column });
  };
  return (
    <div class="layer-map">
      <canvas
        ref={canvas}
        style={{ height: `${height}px` }}
        tabIndex={0}
        role="application"
        aria-roledescription="layer map"
        aria-label={`${describeMap(grid, view)} Arrow keys walk over the cells.`}
        aria-describedby="layer-map-cell"
        data-written={view.progress?.tensors_done ?? 0}
        onMouseMove={point}
        onMouseLeave={() => setAt(null)}
        onKeyDown={walk}
      />
      <p id="layer-map-cell" class="cell-words" aria-live="polite">
        {selected ? (
          <CellWords cell={selected} grid={grid} state={cellState(grid, selected, view.shards, figures)} />
        ) : (
          <span class="muted">{at ? "No tensor here." : "Point at a cell, or focus the map and use the arrow keys."}</span>
        )}
      </p>
      <Legend />
    </div>
  );
}

const MOVES: Record<string, [number, number]> = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
};

function clamp(value: number, length: number): number {
  return Math.min(Math.max(value, 0), length - 1);
}

function layOut(grid: Grid, context: CanvasRenderingContext2D, width: number): Geometry {
  context.font = "11px system-ui, sans-serif";
  const longest = Math.max(...grid.roles.map((role) => context.measureText(shortRole(role)).width));
  const left = Math.ceil(Math.min(longest + 10, width * 0.3));
  const step = Math.min((width - left - MEANS) / grid.layers.length, 64);
  const right = left + step * grid.layers.length + 8;
  return { left, right, step, gap: step > 7 ? 2 : step > 3.5 ? 1 : 0 };
}

function shortRole(role: string): string {
  return role.replace("attention.", "attn ").replace("mlp.", "mlp ").replace("shared_experts.", "shared ");
}

function draw(
  context: CanvasRenderingContext2D,
  grid: Grid,
  { left, right, step, gap }: Geometry,
  view: JobView,
  figures: ReadonlyMap<string, number> | null,
  at: { row: number; column: number } | null,
): void {
  const isDark = currentTheme() === "dark";
  const ink = {
    text: color("muted"),
    empty: color("raised"),
    strong: color("text"),
    accent: color("accent"),
    written: color("line-strong"),
    failed: color("failed"),
  };
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.fillStyle = ink.text;
  context.textAlign = "center";
  const every = [1, 2, 4, 8, 16, 32].find((count) => count * step >= 26) ?? 64;
  grid.layers.forEach((layer, column) => {
    if (layer >= 0 && layer % every !== 0) return;
    context.fillText(layer < 0 ? "–" : String(layer), left + (column + 0.5) * step, HEAD / 2);
  });
  grid.roles.forEach((role, row) => {
    context.textAlign = "right";
    context.fillStyle = ink.text;
    context.fillText(shortRole(role), left - 7, HEAD + (row + 0.5) * ROW, left - 8);
    const removed: number[] = [];
    grid.layers.forEach((layer, column) => {
      const cell = grid.cells.get(cellKey(role, layer));
      if (!cell) return;
      const state = cellState(grid, cell, view.shards, figures);
      if (state.interferenceRemoved !== null) removed.push(state.interferenceRemoved);
      const x = left + column * step;
      const y = HEAD + row * ROW + 1;
      const w = Math.max(step - gap, 1);
      const h = ROW - 2;
      context.fillStyle = ink.empty;
      context.fillRect(x, y, w, h);
      if (state.written >= 1) {
        const share = state.interferenceRemoved;
        context.fillStyle = share === null ? ink.written : scaleColor(removedPlace(share), isDark);
        context.fillRect(x, y, w, h);
      } else {
        context.fillStyle = ink.accent;
        fillFrom(context, x, y, w, h, state.fetched / 3, 0.4);
        fillFrom(context, x, y, w, h, state.solved > 0 ? (1 + state.solved) / 3 : 0, 0.55);
        fillFrom(context, x, y, w, h, state.written > 0 ? (2 + state.written) / 3 : 0, 1);
      }
      if (state.isFailed) cross(context, x, y, w, h, ink.failed);
      if (at && at.row === row && at.column === column) {
        context.lineWidth = 2;
        context.strokeStyle = ink.strong;
        context.strokeRect(x - 1, y - 1, w + 2, h + 2);
      }
    });
    if (removed.length > 0) {
      const mean = removed.reduce((sum, share) => sum + share, 0) / removed.length;
      context.textAlign = "left";
      context.fillStyle = ink.text;
      context.fillText(percent(mean, 1), right, HEAD + (row + 0.5) * ROW);
    }
  });
}

function fillFrom(
  context: CanvasRenderingContext2D,
  x: number,
  y: number,
  w: number,
  h: number,
  share: number,
  alpha: number,
): void {
  if (share <= 0) return;
  context.globalAlpha = alpha;
  context.fillRect(x, y + h * (1 - share), w, h * share);
  context.globalAlpha = 1;
}

function cross(context: CanvasRenderingContext2D, x: number, y: number, w: number, h: number, ink: string): void {
  context.lineWidth = 1.5;
  context.strokeStyle = ink;
  context.strokeRect(x + 0.75, y + 0.75, w - 1.5, h - 1.5);
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(x + w, y + h);
  context.moveTo(x + w, y);
  context.lineTo(x, y + h);
  context.stroke();
}

function describeMap(grid: Grid, view: JobView): string {
  const done = view.progress?.tensors_done ?? 0;
  const names = new Set(grid.layout.map((tensor) => tensor.name));
  return `Map of ${plural(names.size, "tensor")} in ${grid.layers.length} layers and ${grid.roles.length} roles; ${done} uploaded.`;
}

function CellWords({ cell, grid, state }: { cell: Cell; grid: Grid; state: CellState }) {
  const tensors = cell.tensors.map((index) => grid.layout[index]!);
  const names = new Set(tensors.map((tensor) => tensor.name));
  const first = tensors.find((tensor) => tensor.kind === "weights") ?? tensors[0]!;
  const read = tensors.reduce((sum, tensor) => sum + tensor.bytes_read, 0);
  const work = tensors.reduce((sum, tensor) => sum + tensor.flops, 0);
  const share = state.interferenceRemoved;
  return (
    <>
      <code class="break">{names.size === 1 ? first.name : `${names.size} tensors, ${first.name} …`}</code>{" "}
      <b>{describeStage(state)}</b> · {first.shape.join(" × ")} {first.dtype} · {first.method} · shard {first.shard}
      {" · "}
      {bytes(read)} to read · {flops(work)}
      {share !== null && <b> · {percent(share, 1)} of interference removed</b>}
    </>
  );
}

function Legend() {
  const isDark = currentTheme() === "dark";
  const stops = [0, 0.25, 0.5, 0.75, 1].map((share) => scaleColor(share, isDark)).join(", ");
  return (
    <p class="legend">
      <span>
        <i class="swatch" style={{ background: "var(--raised)" }} /> waiting
      </span>
      <span>
        <i class="swatch third" /> fetched
      </span>
      <span>
        <i class="swatch two-thirds" /> solved
      </span>
      <span>
        <i class="swatch" style={{ background: "var(--line-strong)" }} /> uploaded
      </span>
      <span>
        <i class="swatch crossed" /> failed
      </span>
      <span>
        0
        <i class="ramp" style={{ background: `linear-gradient(90deg, ${stops})` }}>
          <b>90</b> <b>99</b>
        </i>
        99.9 % of interference removed
      </span>
    </p>
  );
}
