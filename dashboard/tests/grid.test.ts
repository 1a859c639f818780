import { expect, test } from "vitest";

import type { PlannedTensor } from "../src/api/types";
import { cellKey, cellState, describeStage, makeGrid } from "../src/charts/grid";
import { removedPlace } from "../src/charts/scale";
import type { ShardView } from "../src/live/fold";

function tensor(name: string, role: string, layer: number, shard: number): PlannedTensor {
  return { name, role, layer, shard, kind: "weights", shape: [2, 2], dtype: "F32", method: "wudi", bytes_read: 16, flops: 1 };
}

const LAYOUT = [
  tensor("head", "head", -1, 0),
  tensor("0.down", "mlp.down", 0, 0),
  tensor("0.q", "attention.q", 0, 0),
  tensor("1.q", "attention.q", 1, 1),
  tensor("1.q.bias", "attention.q", 1, 1),
];

function shard(counts: Partial<ShardView>): ShardView {
  const nothing = { fetched: 0, solved: 0, written: 0, receipt: null, error: null, retries: 0 };
  return { state: "running", ...nothing, ...counts };
}

function stateOf(role: string, layer: number, shards: Record<number, ShardView>) {
  const grid = makeGrid(LAYOUT);
  const cell = grid.cells.get(cellKey(role, layer))!;
  return cellState(grid, cell, new Map(Object.entries(shards).map(([key, value]) => [Number(key), value])), null);
}

test("roles stand in the order in which data flows, what is outside the layers first", () => {
  const grid = makeGrid(LAYOUT);
  expect(grid.roles).toEqual(["attention.q", "mlp.down", "head"]);
  expect(grid.layers).toEqual([-1, 0, 1]);
});

test("counts of a shard say how far each of its tensors is, in file order", () => {
  const shards = { 0: shard({ fetched: 3, solved: 2, written: 1 }) };
  expect(describeStage(stateOf("head", -1, shards))).toBe("uploaded");
  expect(describeStage(stateOf("mlp.down", 0, shards))).toBe("solved");
  expect(describeStage(stateOf("attention.q", 0, shards))).toBe("fetched");
  expect(describeStage(stateOf("attention.q", 1, shards))).toBe("waiting");
});

test("a cell of several tensors fills by shares", () => {
  expect(stateOf("attention.q", 1, { 1: shard({ fetched: 1 }) }).fetched).toBe(0.5);
});

test("a published shard is whole and brings its interference", () => {
  const receipt = { interference_removed: [0.75, null] } as never;
  const state = stateOf("attention.q", 1, { 1: shard({ state: "succeeded", receipt }) });
  expect(state).toMatchObject({ written: 1, interferenceRemoved: 0.75 });
});

test("where a failed shard stopped is marked, and what it had solved is not", () => {
  const shards = { 0: shard({ state: "failed", fetched: 2, solved: 1 }) };
  expect(stateOf("head", -1, shards).isFailed).toBe(false);
  expect(stateOf("mlp.down", 0, shards).isFailed).toBe(true);
});

test("the scale tells 90 from 99 and 99.9 %", () => {
  const places = [0, 0.9, 0.99, 0.999, 1].map((share) => Number(removedPlace(share).toFixed(2)));
  expect(places).toEqual([0, 0.33, 0.67, 1, 1]);
});
