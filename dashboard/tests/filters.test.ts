import { expect, test } from "vitest";

import type { Job } from "../src/api/types";
import { isFiltered, listPath, matches, readFilters } from "../src/lib/filters";

const NOW = Date.parse("2026-03-01T12:00:30Z");

function filters(address: string) {
  return readFilters(new URLSearchParams(address));
}

test("an address without filters asks for everything", () => {
  expect(isFiltered(filters(""))).toBe(false);
  expect(listPath(filters(""), NOW)).toBe("v1/jobs?limit=100");
});

test("filters in the address are those of the API, and unknown states are dropped", () => {
  const found = filters("state=failed&state=running&state=odd&method=ties&label.team=vision&since=24h");
  expect(found.states).toEqual(["failed", "running"]);
  expect(listPath(found, NOW)).toBe(
    "v1/jobs?limit=100&state=failed&state=running&method=ties" +
      "&created_after=2026-02-28T12%3A00%3A00.000Z&label.team=vision",
  );
});

test("the path of a list is steady within a minute, so that polling reads one address", () => {
  const found = filters("since=1h");
  expect(listPath(found, NOW)).toBe(listPath(found, NOW + 20_000));
});

test("search looks at ids, models, outputs and labels, all words at once", () => {
  const job = {
    id: "job_1",
    method: "swudi_a",
    state: "running",
    output_uri: "s3://models/Merged",
    inputs: [{ uri: "s3://models/chat", role: "expert", digest: "" }],
    labels: { team: "vision" },
  } as unknown as Job;
  expect(matches(job, "merged CHAT")).toBe(true);
  expect(matches(job, "team=vision swudi")).toBe(true);
  expect(matches(job, "chat code")).toBe(false);
});
