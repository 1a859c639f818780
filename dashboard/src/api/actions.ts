/** What pages do beyond reading. Each creating request has an idempotency key of its own. */

import { request, send } from "./client";
import type { JobDetail, Plan, RecipeValidation } from "./types";

export interface Submission {
  recipe: string;
  output_uri: string;
  options: Record<string, unknown>;
  labels?: Record<string, string>;
  priority?: number;
}

export function validateRecipe(recipe: string): Promise<RecipeValidation> {
  return send("POST", "v1/recipes/validate", { recipe });
}

export function planMerge(submission: Submission): Promise<Plan> {
  const { recipe, output_uri, options } = submission;
  return send("POST", "v1/plans", { recipe, output_uri, options });
}

/** Sent twice with the same key it makes one job, so that a repeated click does no harm. */
export async function submitJob(submission: Submission, key: string): Promise<JobDetail> {
  const response = await request("v1/jobs", {
    method: "POST",
    body: submission,
    headers: { "Idempotency-Key": key },
  });
  return (await response.json()) as JobDetail;
}

export function cancelJob(id: string, mode: "orderly" | "now"): Promise<JobDetail> {
  return send("POST", `v1/jobs/${id}/cancel`, { mode });
}

export function retryJob(id: string): Promise<JobDetail> {
  return send("POST", `v1/jobs/${id}/retry`);
}

/** Forget a job; with its output, the checkpoint that it published is removed first. */
export function forgetJob(id: string, output: "keep" | "delete" = "keep"): Promise<void> {
  return send("DELETE", `v1/jobs/${id}?output=${output}`);
}
