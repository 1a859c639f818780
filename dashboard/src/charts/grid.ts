/**
 * The layer map as data: one cell for each layer and tensor role, with how far its tensors are.
 * Tensors of a shard pass the stages in file order, so that three counts per shard say it all.
 */

import type { PlannedTensor } from "../api/types";
import type { ShardView } from "../live/fold";

export interface Cell {
  role: string;
  layer: number;
  /** Indices into the plan's layout. */
  tensors: number[];
}

export interface Grid {
  roles: string[];
  /** Layer numbers in order; -1, what lies outside the layers, comes first. */
  layers: number[];
  cells: Map<string, Cell>;
  /** Position of each tensor within its shard. */
  positions: number[];
  layout: readonly PlannedTensor[];
}

export interface CellState {
  /** Shares of the cell's tensors that have passed each stage. */
  fetched: number;
  solved: number;
  written: number;
  isFailed: boolean;
  isRunning: boolean;
  /** Mean over its tensors for which it is known. */
  interferenceRemoved: number | null;
}

export function cellKey(role: string, layer: number): string {
  return `${layer} ${role}`;
}

export function makeGrid(layout: readonly PlannedTensor[]): Grid {
  const cells = new Map<string, Cell>();
  const firstSeen = new Map<string, number>();
  const layers = new Set<number>();
  const positions: number[] = [];
  const filled = new Map<number, number>();
  layout.forEach((tensor, index) => {
    const key = cellKey(tensor.role, tensor.layer);
    const cell = cells.get(key) ?? { role: tensor.role, layer: tensor.layer, tensors: [] };
    cell.tensors.push(index);
    cells.set(key, cell);
    layers.add(tensor.layer);
    if (!firstSeen.has(tensor.role)) firstSeen.set(tensor.role, roleRank(tensor.role));
    const position = filled.get(tensor.shard) ?? 0;
    positions.push(position);
    filled.set(tensor.shard, position + 1);
  });
  const roles = [...firstSeen].sort((a, b) => a[1] - b[1] || compare(a[0], b[0])).map(([role]) => role);
  return { roles, layers: [...layers].sort((a, b) => a - b), cells, positions, layout };
}

const ORDER = [
  "embedding",
  "position",
  "attention.q",
  "attention.k",
  "attention.v",
  "attention",
  "attention.o",
  "router",
  "mlp.gate",
  "mlp.up",
  "mlp.down",
  "mlp",
  "norm",
  "bias",
  "projection",
  "head",
];

/** As data flows through a transformer. */
function roleRank(role: string): number {
  const exact = ORDER.indexOf(role);
  if (exact >= 0) return exact;
  const parent = ORDER.findIndex((known) => role.startsWith(`${known}.`));
  return parent >= 0 ? parent + 0.5 : ORDER.length;
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** How far a cell is. `figures` are shares of interference removed by tensor, where known. */
export function cellState(
  grid: Grid,
  cell: Cell,
  shards: ReadonlyMap<number, ShardView>,
  figures: ReadonlyMap<string, number> | null,
): CellState {
  let fetched = 0;
  let solved = 0;
  let written = 0;
  let isFailed = false;
  let isRunning = false;
  let sum = 0;
  let known = 0;
  for (const index of cell.tensors) {
    const tensor = grid.layout[index]!;
    const position = grid.positions[index]!;
    const shard = shards.get(tensor.shard);
    if (!shard) continue;
    const isDone = shard.state === "succeeded";
    if (isDone || position < shard.fetched) fetched += 1;
    if (isDone || position < shard.solved) solved += 1;
    if (isDone || position < shard.written) written += 1;
    isFailed ||= shard.state === "failed" && position >= shard.solved;
    isRunning ||= shard.state === "running";
    const share = figures?.get(tensor.name) ?? shard.receipt?.interference_removed?.[position];
    if (share !== null && share !== undefined) {
      sum += share;
      known += 1;
    }
  }
  const total = cell.tensors.length;
  return {
    fetched: fetched / total,
    solved: solved / total,
    written: written / total,
    isFailed,
    isRunning,
    interferenceRemoved: known > 0 ? sum / known : null,
  };
}

/** A sentence about a cell, for hover, keyboard and screen readers. */
export function describeStage(state: CellState): string {
  if (state.isFailed) return "failed";
  if (state.written >= 1) return "uploaded";
  if (state.written > 0) return "being uploaded";
  if (state.solved >= 1) return "solved";
  if (state.solved > 0) return "being solved";
  if (state.fetched >= 1) return "fetched";
  if (state.fetched > 0) return "being fetched";
  return "waiting";
}
