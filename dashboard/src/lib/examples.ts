/** The repository's example recipes, packed in. */

const FILES = import.meta.glob<string>("../../../examples/recipes/*.yaml", {
  query: "?raw",
  import: "default",
  eager: true,
});

export const EXAMPLES: ReadonlyMap<string, string> = new Map(
  Object.entries(FILES).map(([path, text]) => [path.replace(/^.*\/|\.yaml$/g, ""), text]),
);
