/** Differences between documents, as rows of a table: one for each path at which a value stands. */

export interface Row {
  path: string;
  values: (string | null)[];
  isSame: boolean;
}

/** Every path of any document with its values; null where a document has none. */
export function compareDocuments(documents: unknown[]): Row[] {
  const flat = documents.map((document) => flatten(document));
  const paths = [...new Set(flat.flatMap((values) => [...values.keys()]))];
  return paths.map((path) => {
    const values = flat.map((found) => found.get(path) ?? null);
    return { path, values, isSame: values.every((value) => value === values[0]) };
  });
}

function flatten(document: unknown, prefix = ""): Map<string, string> {
  if (typeof document !== "object" || document === null) {
    return new Map([[prefix || "/", JSON.stringify(document) ?? "null"]]);
  }
  const entries = Object.entries(document);
  if (entries.length === 0) return new Map([[prefix || "/", Array.isArray(document) ? "[]" : "{}"]]);
  return new Map(entries.flatMap(([key, value]) => [...flatten(value, `${prefix}/${key}`)]));
}
