/** The filters of the list of jobs, as they stand in the address and as the API takes them. */

import { JOB_STATES, type JobState } from "../api/types";

export interface Filters {
  states: JobState[];
  method: string;
  since: Since;
  labels: [string, string][];
  /** Words, each to be found somewhere in a job. */
  text: string;
}

export const SINCE = { "": "any time", "1h": "last hour", "24h": "last 24 hours", "7d": "last 7 days" };
export type Since = keyof typeof SINCE;

const HOURS: Record<Since, number> = { "": 0, "1h": 1, "24h": 24, "7d": 168 };

export function readFilters(query: URLSearchParams): Filters {
  const since = query.get("since") ?? "";
  return {
    states: query.getAll("state").filter(isState),
    method: query.get("method") ?? "",
    since: since in SINCE ? (since as Since) : "",
    labels: [...query]
      .filter(([name]) => name.startsWith("label."))
      .map(([name, value]) => [name.slice("label.".length), value]),
    text: query.get("q") ?? "",
  };
}

function isState(value: string): value is JobState {
  return (JOB_STATES as readonly string[]).includes(value);
}

/** Path of the list that these filters ask for. Times are cut to minutes, so that it is steady. */
export function listPath(filters: Filters, now: number, limit = 100): string {
  const query = new URLSearchParams({ limit: String(limit) });
  for (const state of filters.states) query.append("state", state);
  if (filters.method) query.set("method", filters.method);
  if (filters.text.trim()) query.set("q", filters.text.trim());
  const hours = HOURS[filters.since];
  if (hours) {
    const from = Math.floor(now / 60_000) * 60_000 - hours * 3_600_000;
    query.set("created_after", new Date(from).toISOString());
  }
  for (const [name, value] of filters.labels) query.set(`label.${name}`, value);
  return `v1/jobs?${query}`;
}

export function isFiltered(filters: Filters): boolean {
  const { states, method, since, labels, text } = filters;
  return states.length + labels.length > 0 || Boolean(method || since || text);
}
