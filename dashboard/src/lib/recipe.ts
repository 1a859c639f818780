/** A recipe as text that a person writes, changed in place by the form: comments and order stay. */

import { type Document, isMap, isSeq, parseDocument } from "yaml";

import type { Fault } from "../api/types";

export type Path = (string | number)[];

export interface RecipeText {
  text: string;
  document: Document.Parsed;
  /** The text is YAML and a mapping, so that the form can show and change it. */
  isMapping: boolean;
}

export function readRecipe(text: string): RecipeText {
  const document = parseDocument(text, { prettyErrors: false });
  const isEmpty = document.contents === null;
  return { text, document, isMapping: document.errors.length === 0 && (isEmpty || isMap(document.contents)) };
}

export function valueAt(recipe: RecipeText, path: Path): unknown {
  if (!recipe.isMapping || recipe.document.contents === null) return undefined;
  const value: unknown = recipe.document.getIn(path);
  return isMap(value) || isSeq(value) ? value.toJSON() : value;
}

/** The text with a value set, or taken away where `value` is undefined. */
export function withValue(recipe: RecipeText, path: Path, value: unknown): string {
  const { document } = readRecipe(recipe.text);
  if (value === undefined) {
    document.deleteIn(path);
    const parent = path.slice(0, -1);
    const rest: unknown = parent.length > 0 ? document.getIn(parent) : null;
    if (isMap(rest) && rest.items.length === 0 && parent.at(-1) === "parameters") document.deleteIn(parent);
  } else {
    // A plain value is put into its node, which keeps the comment behind it.
    const isPlain = typeof value !== "object" || value === null;
    document.setIn(path, isPlain ? value : document.createNode(value));
  }
  return String(document);
}

/** A value as it is typed into a field: a number, a word, or YAML in one line. */
export function parseValue(text: string): unknown {
  if (text.trim() === "") return undefined;
  const document = parseDocument(text);
  return document.errors.length > 0 ? text : (document.toJS() as unknown);
}

export function showValue(value: unknown): string {
  if (value === undefined || value === null) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}

export interface Place {
  from: number;
  to: number;
}

/** Where a fault is in the text: its value, or the nearest that holds it. */
export function placeOf(recipe: RecipeText, fault: Fault): Place {
  const error = recipe.document.errors[0];
  if (error) return { from: error.pos[0], to: Math.max(error.pos[1], error.pos[0] + 1) };
  const path = parsePointer(fault.pointer);
  for (let length = path.length; length > 0; length -= 1) {
    const range = rangeAt(recipe.document, path.slice(0, length));
    if (range) {
      const text = recipe.text.slice(range.from, range.to).trimEnd();
      return { from: range.from, to: range.from + text.length };
    }
  }
  return { from: 0, to: Math.min(recipe.text.indexOf("\n") >>> 0, recipe.text.length) };
}

export function parsePointer(pointer: string): Path {
  return pointer
    .split("/")
    .slice(1)
    .map((part) => part.replaceAll("~1", "/").replaceAll("~0", "~"))
    .map((part) => (/^\d+$/.test(part) ? Number(part) : part));
}

function rangeAt(document: Document.Parsed, path: Path): Place | null {
  const parent: unknown = path.length > 1 ? document.getIn(path.slice(0, -1), true) : document.contents;
  const last = path.at(-1);
  if (isMap(parent)) {
    const pair = parent.items.find((item) => String(item.key) === String(last));
    const key = pair?.key as { range?: [number, number, number] } | undefined;
    const value = pair?.value as { range?: [number, number, number] } | undefined;
    const from = key?.range?.[0];
    if (from === undefined) return null;
    return { from, to: value?.range?.[1] ?? key!.range![1] };
  }
  if (isSeq(parent) && typeof last === "number") {
    const range = (parent.items[last] as { range?: [number, number, number] } | undefined)?.range;
    return range ? { from: range[0], to: range[1] } : null;
  }
  return null;
}
