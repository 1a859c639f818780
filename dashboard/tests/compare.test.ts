import { expect, test } from "vitest";

import { compareDocuments } from "../src/lib/compare";

test("recipes are compared value by value, and what one lacks is a difference", () => {
  const first = { merge_method: "ties", models: [{ model: "/a" }], parameters: { density: 0.5 } };
  const second = { merge_method: "ties", models: [{ model: "/a" }, { model: "/b" }], parameters: {} };
  const rows = compareDocuments([first, second]);
  expect(rows.filter((row) => !row.isSame)).toEqual([
    { path: "/parameters/density", values: ["0.5", null], isSame: false },
    { path: "/models/1/model", values: [null, '"/b"'], isSame: false },
    { path: "/parameters", values: [null, "{}"], isSame: false },
  ]);
  expect(rows.filter((row) => row.isSame).map((row) => row.path)).toEqual(["/merge_method", "/models/0/model"]);
});
