import { expect, test } from "vitest";

import { parsePointer, parseValue, placeOf, readRecipe, valueAt, withValue } from "../src/lib/recipe";

const TEXT = `# kept
merge_method: ties
models:
  - model: /a
  - model: /b # the second
parameters:
  density: 0.3
`;

test("a value is changed and everything else stays, comments included", () => {
  const changed = withValue(readRecipe(TEXT), ["models", 1, "model"], "/c");
  expect(changed).toBe(TEXT.replace("/b", "/c"));
});

test("a parameter that is taken away takes an empty mapping with it", () => {
  expect(withValue(readRecipe(TEXT), ["parameters", "density"], undefined)).not.toContain("parameters");
});

test("a form writes into a text that is still empty", () => {
  expect(withValue(readRecipe(""), ["parameters", "density"], 0.5)).toBe("parameters:\n  density: 0.5\n");
});

test("a fault is shown at its value, or at the nearest that holds it", () => {
  const recipe = readRecipe(TEXT);
  const shown = (pointer: string) => {
    const { from, to } = placeOf(recipe, { pointer, code: "", detail: "" });
    return TEXT.slice(from, to);
  };
  expect(shown("/parameters/density")).toBe("density: 0.3");
  expect(shown("/models/1/model")).toBe("model: /b");
  expect(shown("/models/1/weight")).toBe("model: /b # the second");
  expect(shown("/base_model")).toBe("# kept");
  expect(parsePointer("/a~1b/0")).toEqual(["a/b", 0]);
});

test("text that is no YAML has its fault where it stops", () => {
  const recipe = readRecipe("merge_method: [");
  expect(recipe.isMapping).toBe(false);
  expect(placeOf(recipe, { pointer: "", code: "", detail: "" }).from).toBeGreaterThan(10);
  expect(valueAt(recipe, ["merge_method"])).toBeUndefined();
});

test.each([
  ["0.5", 0.5],
  ["auto", "auto"],
  ["[0.2, 0.5]", [0.2, 0.5]],
  [" ", undefined],
])("what is typed as %s is %s", (text, value) => expect(parseValue(text)).toEqual(value));
