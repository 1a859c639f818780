/** Objects of the public API, as far as the pages use them. Fields may be added at any time. */

export type JobState =
  | "queued"
  | "planning"
  | "running"
  | "publishing"
  | "succeeded"
  | "failed"
  | "cancelling"
  | "cancelled";

export const JOB_STATES: readonly JobState[] = [
  "queued",
  "planning",
  "running",
  "publishing",
  "succeeded",
  "failed",
  "cancelling",
  "cancelled",
];

export interface Page<Item> {
  data: Item[];
  next_cursor: string | null;
  next_url: string | null;
}

export interface Fault {
  pointer: string;
  code: string;
  detail: string;
}

/** RFC 9457, as every failed request and every failed job has it. */
export interface Problem {
  type?: string;
  title: string;
  status: number;
  detail: string;
  code: string;
  retryable: boolean;
  errors?: Fault[];
  request_id?: string | null;
  retry_after_seconds?: number | null;
  context?: Record<string, unknown>;
  [member: string]: unknown;
}

export interface Progress {
  shards_done: number;
  shards_total: number;
  bytes_done: number;
  bytes_total: number;
  tensors_done: number;
  tensors_total: number;
}

export interface Phase {
  name: string;
  started_at: string;
  finished_at: string | null;
  message: string;
}

export interface Input {
  uri: string;
  role: "base" | "expert";
  digest: string;
}

export interface OutputFile {
  name: string;
  size: number;
  sha256: string;
}

export interface Output {
  uri: string;
  digest: string;
  bytes: number;
  files: OutputFile[];
  /** Of a sweep: each variant's checkpoint. */
  variants?: (Output & { name: string; method: string })[];
}

export interface Integration {
  name: string;
  state: string;
  url: string | null;
  error: Problem | null;
}

export interface Job {
  id: string;
  type: string;
  state: JobState;
  is_terminal: boolean;
  phase: string | null;
  attempt: number;
  created_at: string;
  queued_at: string;
  started_at: string | null;
  finished_at: string | null;
  estimated_finish_at: string | null;
  progress: Progress;
  phases: Phase[];
  recipe_digest: string;
  plan_digest: string | null;
  /** What made the published checkpoint; `methods` names those of all documents or variants. */
  method: string;
  methods: string[];
  inputs: Input[];
  output_uri: string;
  output: Output | null;
  error: Problem | null;
  warnings: string[];
  labels: Record<string, string>;
  metadata: Record<string, string>;
  priority: number;
  deadline_seconds: number | null;
  seed: number;
  initiator: string | null;
  resubmitted_from: string | null;
  cancel_requested: "orderly" | "now" | null;
  integrations: Integration[];
  url: string;
  etag: string;
}

export interface JobDetail extends Job {
  recipe_source: string | Record<string, unknown>;
  recipe: Record<string, unknown>;
  options: Record<string, unknown>;
}

export interface JobCounts {
  counts: Record<JobState, number>;
}

/** What is kept of a published shard; `interference_removed` is in file order. */
export interface Receipt {
  size: number;
  bytes_read: number;
  peak_buffer_bytes: number;
  seconds: Record<string, number>;
  device: string;
  worker: string;
  interference_removed?: (number | null)[];
  [member: string]: unknown;
}

export interface ShardError {
  code: string;
  detail: string;
  retryable?: boolean;
  context?: Record<string, unknown>;
}

export type JobEvent = {
  seq: number;
  type: string;
  time: string;
  job_id: string;
  attempt: number;
  data: Record<string, unknown>;
};

export interface PlannedTensor {
  name: string;
  shard: number;
  /** `intermediate` is what is made of the tensor on the way to it. */
  kind: "weights" | "masks" | "intermediate";
  role: string;
  layer: number;
  shape: number[];
  dtype: string;
  method: string;
  bytes_read: number;
  flops: number;
}

export interface PlanFile {
  name: string;
  size: number;
  tensors: number;
  bytes_read: number;
  flops: number;
}

export interface Estimate {
  total_seconds: number;
  slots: number;
  device: string;
}

export interface Plan {
  plan_digest: string;
  recipe_digest: string;
  method: string;
  methods: string[];
  output_uri: string;
  shards: number;
  tensors: number;
  tensors_by_method: Record<string, number>;
  bytes_read: number;
  bytes_written: number;
  flops: number;
  max_host_bytes: number;
  max_device_bytes: number;
  memory_budget: number;
  device_memory_budget: number | null;
  estimate: Estimate | null;
  files: PlanFile[];
  companions: string[];
  warnings: string[];
  inputs: Input[];
  /** Of a recipe of several, in the order of their steps; else empty. */
  documents: { name: string | null; method: string }[];
  /** Of a sweep, else empty. */
  variants: { name: string; method: string; uri: string }[];
}

/** `GET /v1/jobs/{id}/plan`. */
export interface JobPlan extends Plan {
  layout: PlannedTensor[];
}

export interface ReportTensor {
  name: string;
  shape: number[];
  dtype: string;
  role: string;
  layer: number;
  method: string;
  seconds: number;
  loss_before?: number;
  loss_after?: number;
  interference_removed?: number;
  expert_norms?: number[];
  update_norm?: number;
  [figure: string]: unknown;
}

/** What happens to anything; of what is no event of a job most members are null. */
export interface News {
  position: number;
  type: string;
  time: string;
  subject: string;
  job_id: string | null;
  seq: number | null;
  attempt: number | null;
  state: JobState | null;
  data: Record<string, unknown>;
  labels: Record<string, string>;
  method: string | null;
}

export interface Report {
  plan_digest: string;
  recipe_digest: string;
  method: string;
  inputs: Input[];
  output: Output;
  bytes_read: number;
  read_requests: number;
  totals: {
    tensors: number;
    flops: number;
    layers_solved: number;
    interference_removed: number | null;
  };
  seconds: Record<string, number>;
  busy_seconds: Record<string, number>;
  estimate: Record<string, number> | null;
  peak_buffer_bytes: number;
  devices: string[];
  workers: string[];
  warnings: string[];
  versions: Record<string, string>;
  tensors: ReportTensor[];
  /** Of a sweep: the report of each variant, which has its name in `variant`. */
  variants?: Report[];
  variant?: string;
}

export interface RecipeValidation {
  is_valid: boolean;
  errors: Fault[];
  warnings: string[];
  method: string | null;
  recipe: Record<string, unknown> | null;
  recipe_digest: string | null;
}

export interface JsonSchema {
  type?: string;
  title?: string;
  description?: string;
  default?: unknown;
  enum?: unknown[];
  const?: unknown;
  anyOf?: JsonSchema[];
  items?: JsonSchema;
  properties?: Record<string, JsonSchema>;
  minimum?: number;
  maximum?: number;
  exclusiveMinimum?: number;
  exclusiveMaximum?: number;
  $ref?: string;
  $defs?: Record<string, JsonSchema>;
}

export interface Method {
  name: string;
  title: string;
  summary: string;
  source: string;
  needs_base: boolean;
  min_experts: number;
  max_experts: number | null;
  recommended?: boolean;
  parameters: JsonSchema;
  expert_parameters: JsonSchema;
}

export interface Token {
  id: string;
  name: string;
  prefix: string;
  scopes: string[];
  created_at: string;
  expires_at: string | null;
  revoked_at: string | null;
  last_used_at: string | null;
}

export interface NewToken extends Token {
  secret: string;
}

export interface Version {
  version: string;
  api: string;
  plan_format: number;
  packages: Record<string, string>;
}

export interface Worker {
  id: string;
  node: string;
  device: string;
  is_busy: boolean;
  task: { job_id: string; shard_index: number; file_name: string; started_at: string } | null;
  shards_done: number;
  bytes_done: number;
  last_seen_at: string;
}

export interface WebhookEndpoint {
  id: string;
  created_at: string;
  url: string;
  description: string;
  events: string[];
  format: string;
  is_enabled: boolean;
  secret?: string;
  paused_until: string | null;
  flagged_at: string | null;
  flag: string | null;
}

export interface WebhookDelivery {
  id: string;
  message_id: string;
  type: string;
  data: Record<string, unknown>;
  created_at: string;
  state: string;
  attempts: number;
  due_at: string | null;
  last_attempt_at: string | null;
  response_status: number | null;
  response_body: string | null;
  error: string | null;
}
