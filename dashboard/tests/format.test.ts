import { expect, test } from "vitest";

import { bytes, duration, flops, percent, plural, shortUri, wholeSize } from "../src/lib/format";
import { concerns, firstSentence, remedy } from "../src/lib/words";
import { toYaml } from "../src/lib/yaml";
import { parsePlace } from "../src/lib/router";

test.each([
  [0, "0 B"],
  [999, "999 B"],
  [1000, "1.00 kB"],
  [999_600, "1.00 MB"],
  [141_107_412_992, "141 GB"],
])("%d bytes are %s", (count, text) => expect(bytes(count)).toBe(text));

test.each([
  [0, "0.0 s"],
  [0.02, "20 ms"],
  [9.96, "10.0 s"],
  [59.7, "1 min 00 s"],
  [3725, "1 h 02 min"],
  [200_000, "2 d 7 h"],
])("%d seconds are %s", (seconds, text) => expect(duration(seconds)).toBe(text));

test("units follow numbers everywhere", () => {
  expect(flops(7.65e11)).toBe("765 GFLOP");
  expect(percent(0.9876, 1)).toBe("98.8 %");
  expect(plural(1, "try", "tries")).toBe("1 try");
  expect(plural(1200, "shard")).toBe("1,200 shards");
  expect(shortUri("s3://models/merged/")).toBe("merged");
});

test("an error's sentences become what happened and what to do", () => {
  const detail = "Tensor 'a.b' of expert 2 has NaN. Merge without that expert, or set check_finite.";
  const problem = { title: "", status: 422, code: "x", retryable: false, detail };
  expect(firstSentence(detail)).toBe("Tensor 'a.b' of expert 2 has NaN.");
  expect(remedy(problem)).toBe("Merge without that expert, or set check_finite.");
  expect(remedy({ ...problem, detail: "It broke.", retryable: true })).toContain("retry");
  expect(concerns(problem)).toEqual([["Tensor", "a.b"]]);
  const context = { tensor_name: "a.b", shard_index: 0, expert: 2 };
  expect(concerns({ ...problem, context })).toEqual([
    ["Tensor", "a.b"],
    ["Shard", "0"],
    ["expert", "2"],
  ]);
});

test("YAML that is written means what the JSON meant", () => {
  const text = toYaml({ method: "ties", models: [{ model: "s3://m/a", weight: 0.5 }], on: "yes", none: null, list: [1, 2] });
  expect(text.trim()).toBe(
    'method: ties\nmodels:\n  - model: s3://m/a\n    weight: 0.5\n"on": "yes"\nnone: null\nlist: [1, 2]',
  );
});

test("addresses are read below any prefix", () => {
  expect(parsePlace("/tools/merge/jobs/job_1", "?tab=log", "/tools/merge/").segments).toEqual(["jobs", "job_1"]);
  expect(parsePlace("/", "", "/").segments).toEqual([]);
});

test.each([
  [5_000_000_000, "5GB"],
  [300_000, "300kB"],
  [1_234_567, "1234567"],
])("a size is written as the recipe's options take it: %d", (size, text) => {
  expect(wholeSize(size)).toBe(text);
});
