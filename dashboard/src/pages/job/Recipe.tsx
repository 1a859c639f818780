import type { Input, JobDetail } from "../../api/types";
import { bytes, shortDigest, shortUri } from "../../lib/format";
import { Link, href } from "../../lib/router";
import { toYaml } from "../../lib/yaml";
import { Icon } from "../../ui/icons";
import { Card, Copy } from "../../ui/parts";
import type { TabProps } from "../Job";

export function RecipeTab({ job }: TabProps) {
  const sent = typeof job.recipe_source === "string" ? job.recipe_source : toYaml(job.recipe_source).trim();
  const normal = toYaml(job.recipe).trim();
  return (
    <div class="stack">
      <Card title="From inputs to output">
        <Lineage job={job} />
      </Card>
      <div class="columns">
        <Card title="Recipe as it was sent" aside={<Copy text={sent} label="Copy the recipe" />} flush>
          <pre class="code" tabIndex={0}>
            {sent}
          </pre>
        </Card>
        <Card title="In its normal form" aside={<Digest digest={job.recipe_digest} />} flush>
          <pre class="code" tabIndex={0}>
            {normal}
          </pre>
        </Card>
      </div>
      <Card title="Submission">
        <dl class="facts">
          <dt>Options</dt>
          <dd class="mono break">{pairs(job.options)}</dd>
          <dt>Labels</dt>
          <dd class="mono break">{pairs(job.labels)}</dd>
          <dt>Metadata</dt>
          <dd class="mono break">{pairs(job.metadata)}</dd>
          <dt>Priority, seed</dt>
          <dd class="num">
            {job.priority}, {job.seed}
          </dd>
          <dt>Submitted by</dt>
          <dd class="mono break">{job.initiator ?? "–"}</dd>
          {job.plan_digest && (
            <>
              <dt>Plan</dt>
              <dd>
                <Digest digest={job.plan_digest} />
              </dd>
            </>
          )}
          {job.integrations.map((item) => (
            <>
              <dt>Told to {item.name}</dt>
              <dd class="break">
                {item.state}
                {item.error && `: ${item.error.detail}`}
                {item.url && (
                  <>
                    {" "}
                    <a href={item.url}>{item.url}</a>
                  </>
                )}
              </dd>
            </>
          ))}
          {job.resubmitted_from && (
            <>
              <dt>Made from</dt>
              <dd>
                <Link to={href(`jobs/${job.resubmitted_from}`)}>{job.resubmitted_from}</Link>
              </dd>
            </>
          )}
        </dl>
      </Card>
    </div>
  );
}

/** What was set, as `name=value`. */
function pairs(values: Record<string, unknown>): string {
  const set = Object.entries(values).filter(([, value]) => value !== null);
  return set.map(([name, value]) => `${name}=${value}`).join("  ") || "none";
}

function Lineage({ job }: { job: JobDetail }) {
  return (
    <div class="lineage">
      <ul aria-label="Inputs">
        {job.inputs.map((input, index) => (
          <li key={`${input.uri} ${index}`} class="node">
            <InputNode input={input} number={job.inputs.slice(0, index).filter(({ role }) => role === "expert").length} />
          </li>
        ))}
      </ul>
      <span class="muted">
        <Icon name="arrow" size={20} />
      </span>
      <div class="node">
        <span class="muted">merged by {job.methods.join(", ")}</span>
        <div>
          <b class="break">{shortUri(job.output_uri)}</b>
        </div>
        <div class="mono break muted">{job.output_uri}</div>
        {job.output ? (
          <>
            <Digest digest={job.output.digest} />
            <span class="muted num">
              {" "}
              · {bytes(job.output.bytes)} in {job.output.files.length} files
              {job.output.variants && ` of ${job.output.variants.length} variants`}
            </span>
          </>
        ) : (
          <span class="muted">not complete</span>
        )}
      </div>
    </div>
  );
}

function InputNode({ input, number }: { input: Input; number: number }) {
  return (
    <>
      <span class="muted">{input.role === "base" ? "base model" : `expert ${number + 1}`}</span>
      <div>
        <b class="break">{shortUri(input.uri)}</b>
      </div>
      <div class="mono break muted">{input.uri}</div>
      {input.digest && <Digest digest={input.digest} />}
    </>
  );
}

export function Digest({ digest }: { digest: string }) {
  return (
    <span class="nowrap">
      <code title={digest}>{shortDigest(digest)}</code>
      <Copy text={digest} label="Copy the digest" />
    </span>
  );
}
