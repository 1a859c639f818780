/** Speed and what remains, from samples of progress; says nothing rather than something wrong. */

import type { Sample } from "./fold";

const WINDOW_MILLISECONDS = 30_000;
const LEAST_MILLISECONDS = 2_000;
const STEADY_MILLISECONDS = 20_000;

/** Bytes a second over the last half minute; null while too little is known. */
export function currentRate(samples: readonly Sample[], now: number): number | null {
  const last = samples.at(-1);
  if (!last) return null;
  const from = now - WINDOW_MILLISECONDS;
  let first = last;
  for (let index = samples.length - 1; index >= 0; index -= 1) {
    const sample = samples[index]!;
    if (sample.bytes > last.bytes) break; // a shard was tried again: what was done is undone
    first = sample;
    if (sample.time < from) break;
  }
  const elapsed = Math.max(last.time, Math.min(now, last.time + WINDOW_MILLISECONDS)) - first.time;
  if (elapsed < LEAST_MILLISECONDS || last.bytes <= first.bytes) return null;
  return ((last.bytes - first.bytes) * 1000) / elapsed;
}

export interface Remaining {
  seconds: number;
  /** Too little is known, or speed has varied so much, that only the order of magnitude counts. */
  isRough: boolean;
}

/**
 * Seconds until all bytes are moved: between what the whole run and the last half minute let
 * expect. Null until a twentieth is done, since the start says little.
 */
export function remaining(
  samples: readonly Sample[],
  bytesTotal: number,
  now: number,
): Remaining | null {
  const first = samples[0];
  const last = samples.at(-1);
  const recent = currentRate(samples, now);
  if (!first || !last || recent === null || bytesTotal <= 0) return null;
  if (last.bytes < bytesTotal / 20 || last.time <= first.time) return null;
  const overall = ((last.bytes - first.bytes) * 1000) / (last.time - first.time);
  if (overall <= 0) return null;
  const left = bytesTotal - last.bytes;
  const mean = left / Math.sqrt(recent * overall);
  const spread = Math.max(recent, overall) / Math.min(recent, overall);
  return { seconds: mean, isRough: spread > 1.5 || now - first.time < STEADY_MILLISECONDS };
}

export interface Series {
  /** Seconds since the epoch. */
  times: number[];
  bytesPerSecond: (number | null)[];
}

/** Throughput over time in at most `points` equal steps; a step without news continues the last. */
export function throughput(samples: readonly Sample[], points = 120): Series {
  const first = samples[0];
  const last = samples.at(-1);
  if (!first || !last || last.time <= first.time) return { times: [], bytesPerSecond: [] };
  const step = Math.max((last.time - first.time) / points, 250);
  const times: number[] = [];
  const bytesPerSecond: (number | null)[] = [];
  let index = 0;
  let before = first;
  for (let end = first.time + step; end <= last.time + step / 2; end += step) {
    let now = before;
    while (index < samples.length && samples[index]!.time <= end) {
      now = samples[index]!;
      index += 1;
    }
    if (now === before) continue;
    const gained = now.bytes - before.bytes;
    times.push(now.time / 1000);
    bytesPerSecond.push(gained < 0 ? null : (gained * 1000) / Math.max(now.time - before.time, 1));
    before = now;
  }
  return { times, bytesPerSecond };
}
