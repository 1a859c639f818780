import { type Filters, isFiltered } from "../../lib/filters";
import { Link, href } from "../../lib/router";
import { Copy } from "../../ui/parts";

const EXAMPLE = `mergeyard submit recipe.yaml --output ./merged --watch`;

/** Nothing is listed: why, or how to begin. */
export function NoJobs({ filters }: { filters: Filters }) {
  if (isFiltered(filters)) {
    return (
      <div class="card empty">
        <p>No job fits these filters.</p>
        <p>
          <Link to={href("jobs")}>Show all jobs</Link>
        </p>
      </div>
    );
  }
  const base = new URL(href(""), location.origin).href.replace(/\/$/, "");
  const curl = `curl '${base}/v1/jobs' \\
  -H "Authorization: Bearer $MERGEYARD_TOKEN" -H 'Content-Type: application/json' \\
  -d '{
    "recipe": {
      "merge_method": "swudi_a",
      "base_model": "/models/base",
      "models": [{"model": "/models/chat"}, {"model": "/models/code"}]
    },
    "output_uri": "/models/merged"
  }'`;
  return (
    <div class="card empty stack">
      <p>No job yet. Submit one from a shell,</p>
      <pre class="code">{EXAMPLE}</pre>
      <p>
        or over HTTP <Copy text={curl} label="Copy the command" />
      </p>
      <pre class="code">{curl}</pre>
      <p>
        or <Link to={href("new")}>write a recipe here</Link>.
      </p>
    </div>
  );
}
