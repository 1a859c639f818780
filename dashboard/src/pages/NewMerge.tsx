/** Writing a recipe: as text or in a form, checked as one types, planned before it can be sent. */

import { useEffect, useMemo, useState } from "preact/hooks";

import { type Submission, submitJob } from "../api/actions";
import { ApiError, apiUrl } from "../api/client";
import type { JobDetail, Method, Page, Problem } from "../api/types";
import { EXAMPLES } from "../lib/examples";
import { wholeSize } from "../lib/format";
import { lazy } from "../lib/lazy";
import { placeOf, readRecipe } from "../lib/recipe";
import { useResource } from "../lib/resource";
import { href, navigate, setQuery, usePlace } from "../lib/router";
import { toYaml } from "../lib/yaml";
import { Icon } from "../ui/icons";
import { Card, Copy, Loading, ProblemNotice, curlCommand } from "../ui/parts";
import { PlanPreview } from "./new/PlanPreview";
import { RecipeForm, TextField } from "./new/RecipeForm";
import { useCheck } from "./new/useCheck";

const Editor = lazy(() => import("../ui/Editor").then((module) => module.Editor));

const START = "merge_method: swudi_a\nbase_model: \nmodels:\n  - model: \n  - model: \ndtype: bfloat16\n";

export function NewMergePage() {
  const { query } = usePlace();
  const from = query.get("from");
  const original = useResource<JobDetail>(from ? `v1/jobs/${from}` : null);
  if (from && original.problem) return <ProblemNotice problem={original.problem} />;
  if (from && !original.data) return <Loading what="the job" />;
  const example = query.get("example") ?? "";
  const start = original.data ? draftOf(original.data) : draft(EXAMPLES.get(example) ?? START);
  return <Workbench key={`${from ?? ""} ${example}`} start={start} />;
}

interface Draft {
  recipe: string;
  output: string;
  maxShardSize: string;
  isOverwrite: boolean;
  labels: string;
  options: Record<string, unknown>;
}

function draft(recipe: string): Draft {
  return { recipe, output: "", maxShardSize: "5GB", isOverwrite: false, labels: "", options: {} };
}

function draftOf(job: JobDetail): Draft {
  const recipe = typeof job.recipe_source === "string" ? job.recipe_source : `${toYaml(job.recipe_source).trim()}\n`;
  const { max_shard_size: size, overwrite, ...options } = job.options;
  return {
    recipe,
    output: `${job.output_uri}-2`,
    maxShardSize: typeof size === "number" ? wholeSize(size) : String(size ?? "5GB"),
    isOverwrite: Boolean(overwrite),
    labels: Object.entries(job.labels).map(([name, value]) => `${name}=${value}`).join(", "),
    options,
  };
}

function submissionOf(state: Draft): Submission {
  const labels = state.labels.split(",").map((item) => item.trim()).filter(Boolean);
  return {
    recipe: state.recipe,
    output_uri: state.output.trim(),
    options: { ...state.options, max_shard_size: state.maxShardSize, overwrite: state.isOverwrite },
    labels: Object.fromEntries(
      labels.map((item) => {
        const [name = "", ...value] = item.split("=");
        return [name.trim(), value.join("=").trim()];
      }),
    ),
  };
}

function Workbench({ start }: { start: Draft }) {
  const { query } = usePlace();
  const [state, setState] = useState(start);
  const [problem, setProblem] = useState<Problem | null>(null);
  const [isSending, setIsSending] = useState(false);
  const change = (part: Partial<Draft>) => setState((before) => ({ ...before, ...part }));
  const submission = useMemo(() => submissionOf(state), [state]);
  const check = useCheck(submission);
  // One key for one thing to submit: a second click makes no second job.
  const key = useMemo(() => crypto.getRandomValues(new Uint32Array(4)).join("-"), [submission]);
  useEffect(() => setProblem(null), [submission]);

  const submit = async () => {
    setIsSending(true);
    try {
      const job = await submitJob(submission, key);
      navigate(href(`jobs/${job.id}`));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setProblem(error.problem);
      setIsSending(false);
    }
  };
  const curl = `${curlCommand("v1/jobs")} \\\n  -H 'Content-Type: application/json' -d '${JSON.stringify(submission).replaceAll("'", "'\\''")}'`;
  return (
    <div class="stack">
      <div class="row spread">
        <h1>New merge</h1>
        <div class="row">
          <span class="viewbar">
            <a class="button quiet small" href={apiUrl("v1/methods")} title="The methods, as the form is made from them">
              <Icon name="json" size={13} /> JSON
            </a>
            <Copy text={curl} label="Copy this submission as a curl command">
              curl
            </Copy>
          </span>
          <label class="row">
            <span class="label">Start from</span>
            <select
              class="input"
              value={query.get("example") ?? ""}
              onChange={(event) => setQuery({ example: event.currentTarget.value, from: null })}
            >
              <option value="">{query.get("from") ? "another job" : "an empty recipe"}</option>
              {[...EXAMPLES.keys()].map((name) => (
                <option key={name} value={name}>
                  {name}
                </option>
              ))}
            </select>
          </label>
        </div>
      </div>
      <div class="columns">
        <RecipeCard text={state.recipe} check={check} onChange={(recipe) => change({ recipe })} />
        <div class="stack start">
          <OutputCard state={state} change={change} />
          <PlanPreview check={check} hasOutput={submission.output_uri !== ""} />
          {problem && <ProblemNotice problem={problem} />}
          <button
            type="button"
            class="button primary"
            disabled={!check.isCurrent || isSending}
            onClick={submit}
          >
            Submit the merge
          </button>
        </div>
      </div>
    </div>
  );
}

interface RecipeCardProps {
  text: string;
  check: ReturnType<typeof useCheck>;
  onChange: (text: string) => void;
}

function RecipeCard({ text, check, onChange }: RecipeCardProps) {
  const { query } = usePlace();
  const isForm = query.get("as") === "form";
  const methods = useResource<Page<Method>>("v1/methods");
  const recipe = useMemo(() => readRecipe(text), [text]);
  const diagnostics = useMemo(() => {
    const faults = [...(check.validation?.errors ?? []), ...(check.problem?.errors ?? [])];
    return faults.map((fault) => ({
      ...placeOf(recipe, fault),
      severity: "error" as const,
      message: fault.detail,
    }));
  }, [check.validation, check.problem]);
  const tab = (name: string, label: string) => (
    <button
      type="button"
      class="button quiet small"
      aria-pressed={isForm === (name === "form")}
      onClick={() => setQuery({ as: name })}
    >
      {label}
    </button>
  );
  return (
    <Card
      title="Recipe"
      flush={!isForm}
      aside={
        <span class="switch">
          {tab("", "Text")}
          {tab("form", "Form")}
        </span>
      }
    >
      {isForm ? (
        <RecipeForm recipe={recipe} methods={methods.data?.data ?? []} onChange={onChange} />
      ) : (
        <Editor label="Recipe in YAML" text={text} diagnostics={diagnostics} onChange={onChange} />
      )}
    </Card>
  );
}

function OutputCard({ state, change }: { state: Draft; change: (part: Partial<Draft>) => void }) {
  return (
    <Card title="Output">
      <div class="stack">
        <TextField
          label="Output"
          value={state.output}
          placeholder="s3://models/merged or a folder"
          onChange={(output) => change({ output: output ?? "" })}
        />
        <div class="fields">
          <TextField
            label="Largest output file"
            value={state.maxShardSize}
            onChange={(maxShardSize) => change({ maxShardSize: maxShardSize ?? "" })}
          />
          <TextField
            label="Labels"
            value={state.labels}
            placeholder="team=vision, run=7"
            onChange={(labels) => change({ labels: labels ?? "" })}
          />
        </div>
        <label class="row">
          <input
            type="checkbox"
            checked={state.isOverwrite}
            onChange={(event) => change({ isOverwrite: event.currentTarget.checked })}
          />
          Replace a checkpoint that is already there
        </label>
      </div>
    </Card>
  );
}
