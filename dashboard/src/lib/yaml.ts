/** A small YAML writer for what the API gives back: plain JSON values, in their order. */

export function toYaml(value: unknown, indent = ""): string {
  if (Array.isArray(value)) {
    if (value.length === 0) return "[]";
    if (value.every(isScalar)) return `[${value.map(scalar).join(", ")}]`;
    return value.map((item) => `\n${indent}- ${toYaml(item, `${indent}  `).trimStart()}`).join("");
  }
  if (typeof value === "object" && value !== null) {
    const entries = Object.entries(value);
    if (entries.length === 0) return "{}";
    return entries.map(([key, item]) => `\n${indent}${scalar(key)}:${member(item, indent)}`).join("");
  }
  return scalar(value);
}

function member(item: unknown, indent: string): string {
  const text = toYaml(item, `${indent}  `);
  return text.startsWith("\n") ? text : ` ${text}`;
}

function isScalar(value: unknown): boolean {
  return typeof value !== "object" || value === null;
}

/** Text is quoted wherever YAML could take it for something else. */
function scalar(value: unknown): string {
  if (typeof value !== "string") return JSON.stringify(value) ?? "null";
  const isPlain = /^[A-Za-z_/.][\w./@+-]*$|^[A-Za-z][\w+.-]*:\/\/[\w./@+%-]+$/.test(value);
  const isWord = /^(true|false|yes|no|on|off|null|y|n|\.(inf|nan))$/i.test(value);
  return isPlain && !isWord ? value : JSON.stringify(value);
}
