import { expect, test } from "vitest";

import { isFiltered, listPath, readFilters } from "../src/lib/filters";

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

test("the path of a list is steady within a minute, so that filters alone make it another", () => {
  const found = filters("since=1h");
  expect(listPath(found, NOW)).toBe(listPath(found, NOW + 20_000));
});

test("words to search for are those of the API", () => {
  const found = filters("q=+merged+CHAT+");
  expect(isFiltered(found)).toBe(true);
  expect(listPath(found, NOW)).toBe("v1/jobs?limit=100&q=merged+CHAT");
});
