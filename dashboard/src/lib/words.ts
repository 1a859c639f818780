/** Events and states as sentences. */

import type { JobDetail, JobEvent, Problem } from "../api/types";
import type { JobView } from "../live/fold";
import { bytes, duration, percent, plural, seconds, shortUri } from "./format";

const PHASES: Record<string, string> = {
  reading_headers: "Reading headers",
  checking_output: "Checking the output",
  waiting_for_workers: "Waiting for workers",
  merging: "Merging",
  publishing: "Publishing",
};

const SHORT_PHASES: Record<string, string> = {
  reading_headers: "Headers",
  checking_output: "Output",
  waiting_for_workers: "Workers",
};

/** For where there is little room. */
export function shortPhaseName(name: string): string {
  return SHORT_PHASES[name] ?? phaseName(name);
}

export function phaseName(name: string): string {
  const words = name.replaceAll("_", " ");
  return PHASES[name] ?? words.charAt(0).toUpperCase() + words.slice(1);
}

/** What is going on with a job, in one sentence. */
export function stateSentence(job: JobDetail, view: JobView, now: number): string {
  const took = seconds(job.started_at, job.finished_at, now);
  const time = took === null ? "" : ` after ${duration(took)}`;
  const progress = job.progress;
  const experts = job.inputs.filter((input) => input.role === "expert").length;
  switch (job.state) {
    case "queued":
      return job.attempt > 1 ? "Queued again; finished shards are reused." : "Waiting for a runner.";
    case "planning":
      return `${phaseName(job.phase ?? "planning")} of ${plural(job.inputs.length, "model")}; nothing is written yet.`;
    case "running":
      return view.tries.length === 0
        ? "Planned; waiting for a worker to take up the first shard."
        : `Merging: ${progress.shards_done} of ${plural(progress.shards_total, "shard")} published, ${running(view)} in work.`;
    case "publishing":
      return "All shards are published; config, report and index follow, then everything is verified.";
    case "succeeded":
      return `Merged ${plural(experts, "expert")} into ${shortUri(job.output_uri)}${variants(job)}${took === null ? "" : ` in ${duration(took)}`}.`;
    case "failed":
      return progress.shards_total === 0
        ? `Failed${time}, before anything was written.`
        : `Failed${time}: ${progress.shards_done} of ${plural(progress.shards_total, "shard")} were published.`;
    case "cancelling":
      return job.cancel_requested === "now"
        ? "Cancelling: worker processes are being ended."
        : "Cancelling: workers abort their uploads and tidy up.";
    case "cancelled":
      return `Cancelled${time}. Published shards stay until the output is merged anew.`;
    default:
      return job.state;
  }
}

function variants({ output }: JobDetail): string {
  return output?.variants ? ` (${plural(output.variants.length, "variant")})` : "";
}

function running(view: JobView): number {
  return view.tries.filter((item) => item.outcome === "running").length;
}

export function firstSentence(text: string): string {
  return /^.*?[.!?](?=\s|$)/s.exec(text)?.[0] ?? text;
}

/** What a failed job's problem says should be done; errors end with it. */
export function remedy(problem: Problem): string {
  const rest = problem.detail.slice(firstSentence(problem.detail).length).trim();
  if (rest) return rest;
  return problem.retryable
    ? "This may pass by itself: retry, and finished shards are reused."
    : "Change what is named here, then retry or submit the recipe anew.";
}

/** Tensor, file and worker that a problem concerns, where it knows them. */
export function concerns(problem: Problem): [string, string][] {
  // Some errors name the tensor in their sentence alone.
  const named = /\btensor '([^']+)'/i.exec(problem.detail)?.[1];
  const context = { ...(named ? { tensor_name: named } : {}), ...problem.context };
  const names: [string, string][] = [
    ["tensor_name", "Tensor"],
    ["shard_index", "Shard"],
    ["file_name", "File"],
    ["uri", "Address"],
    ["worker", "Worker"],
  ];
  const facts: Record<string, unknown> = context;
  const known = names
    .filter(([key]) => facts[key] !== undefined && facts[key] !== null)
    .map(([key, label]): [string, string] => [label, String(facts[key])]);
  const shown = new Set(names.map(([key]) => key));
  const others = Object.entries(context)
    .filter(([key]) => !shown.has(key))
    .map(([key, value]): [string, string] => [key.replaceAll("_", " "), text(value)]);
  return [...known, ...others];
}

function text(value: unknown): string {
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** One event as a line of a log. */
export function eventSentence(event: JobEvent): string {
  const data = event.data as Record<string, any>;
  switch (event.type) {
    case "job.created":
      return `Submitted: ${(data.methods ?? [data.method]).join(", ")} into ${data.output_uri}`;
    case "job.state_changed":
      return `${data.from} → ${data.to}${data.cancel_requested ? ` (cancel asked for: ${data.cancel_requested})` : ""}`;
    case "job.phase_changed":
      return `${phaseName(String(data.name))}${data.message ? `: ${data.message}` : ""}`;
    case "job.warning":
      return `Warning: ${data.detail}`;
    case "shard.started":
      return `Shard ${data.shard_index}, try ${data.attempt}: taken up by ${data.worker} on ${data.device}`;
    case "shard.finished":
      return data.state === "succeeded"
        ? `Shard ${data.shard_index} published: ${published(data.receipt)}`
        : `Shard ${data.shard_index} failed: ${data.error?.detail ?? ""}`;
    case "shard.retried":
      return `Shard ${data.shard_index}, try ${data.attempt} failed and is tried again: ${data.error?.detail ?? ""}`;
    case "job.output_committed":
      return `Output complete: ${bytes(data.output?.bytes ?? 0)} in ${plural(data.output?.files?.length ?? 0, "file")} at ${data.output?.uri}`;
    case "job.finished":
      return `Finished: ${data.state}${data.error ? `: ${data.error.detail}` : ""}`;
    default:
      return event.type;
  }
}

function published(receipt: Record<string, any> | undefined): string {
  if (!receipt) return "";
  const parts = [`${bytes(receipt.size ?? 0)} written`, `${bytes(receipt.bytes_read ?? 0)} read`];
  if (receipt.seconds?.total !== undefined) parts.push(`in ${duration(receipt.seconds.total)}`);
  const shares = ((receipt.interference_removed ?? []) as (number | null)[]).filter((share) => share !== null);
  if (shares.length > 0) {
    const mean = shares.reduce((sum, share) => sum + share, 0) / shares.length;
    parts.push(`${percent(mean, 1)} of interference removed`);
  }
  return parts.join(", ");
}

export function isBad(event: JobEvent): boolean {
  return (
    event.type === "shard.retried" ||
    (event.type === "shard.finished" && event.data.state === "failed") ||
    (event.type === "job.finished" && event.data.state === "failed")
  );
}
