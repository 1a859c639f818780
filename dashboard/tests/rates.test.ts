import { expect, test } from "vitest";

import { currentRate, remaining, throughput } from "../src/live/rates";

const START = Date.parse("2026-03-01T12:00:00Z");

function samples(points: [seconds: number, bytes: number][]) {
  return points.map(([seconds, bytes]) => ({ time: START + seconds * 1000, bytes, tensors: 0 }));
}

test("the rate is that of the last half minute", () => {
  const steady = samples(Array.from({ length: 100 }, (_, i) => [i, i < 60 ? i : 60 + (i - 60) * 10]));
  expect(currentRate(steady, START + 99_000)).toBeCloseTo(10, 0);
});

test("nothing is said of the rate before two seconds", () => {
  expect(currentRate(samples([[0, 0], [1, 50]]), START + 1000)).toBeNull();
  expect(currentRate([], START)).toBeNull();
});

test("a rate falls when news stay away", () => {
  const points = samples([[0, 0], [5, 500], [10, 1000]]);
  expect(currentRate(points, START + 10_000)).toBeCloseTo(100);
  expect(currentRate(points, START + 20_000)).toBeCloseTo(50);
});

test("bytes that were undone by a repeated shard give no negative rate", () => {
  const points = samples([[0, 0], [5, 900], [10, 300], [15, 600]]);
  expect(currentRate(points, START + 15_000)).toBeCloseTo(60);
});

test("what remains is said once a twentieth is done", () => {
  const early = samples([[0, 0], [4, 4]]);
  expect(remaining(early, 1000, START + 4000)).toBeNull();
  const soon = samples([[0, 0], [10, 500]]);
  expect(remaining(soon, 1000, START + 10_000)).toEqual({ seconds: 10, isRough: true });
  const later = samples([[0, 0], [10, 250], [20, 500]]);
  expect(remaining(later, 1000, START + 20_000)).toEqual({ seconds: 20, isRough: false });
});

test("what remains is called rough where the speed has changed a lot", () => {
  const slower = samples(Array.from({ length: 120 }, (_, i) => [i, i < 60 ? i * 100 : 6000 + (i - 60) * 10]));
  const left = remaining(slower, 10_000, START + 119_000);
  expect(left?.isRough).toBe(true);
});

test("throughput is drawn in bounded points and in the right sum", () => {
  const long = samples(Array.from({ length: 5000 }, (_, i) => [i, i * 7]));
  const series = throughput(long, 100);
  expect(series.times.length).toBeLessThanOrEqual(101);
  for (const value of series.bytesPerSecond) expect(value).toBeCloseTo(7);
});

test("throughput has a gap, not a dip below zero, where bytes were undone", () => {
  const series = throughput(samples([[0, 0], [1, 100], [2, 50], [3, 150]]), 3);
  expect(series.bytesPerSecond).toEqual([100, null, 100]);
});
