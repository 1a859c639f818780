import { useState } from "preact/hooks";

import { cancelJob, forgetJob, retryJob } from "../../api/actions";
import type { JobDetail, JobPlan, Output } from "../../api/types";
import { bytes, plural, shortUri } from "../../lib/format";
import { useResource } from "../../lib/resource";
import { Link, href, navigate } from "../../lib/router";
import { may, useSession } from "../../lib/session";
import { Confirm } from "../../ui/Confirm";
import { ProblemNotice } from "../../ui/parts";

type Question = "cancel" | "retry" | "forget" | "delete";

interface ActionsProps {
  job: JobDetail;
  onChange: (job: JobDetail) => void;
}

export function Actions({ job, onChange }: ActionsProps) {
  const [question, setQuestion] = useState<Question | null>(null);
  const session = useSession();
  if (!may(session, "jobs:write")) return null;
  const canCancel = !job.is_terminal && job.cancel_requested !== "now";
  return (
    <div class="row">
      {canCancel && (
        <button type="button" class="button danger" onClick={() => setQuestion("cancel")}>
          Cancel
        </button>
      )}
      {job.state === "failed" && (
        <button type="button" class="button primary" onClick={() => setQuestion("retry")}>
          Retry
        </button>
      )}
      <Link to={href("new", { from: job.id })} class="button">
        Clone
      </Link>
      {job.output && may(session, "output:delete") && (
        <button type="button" class="button danger" onClick={() => setQuestion("delete")}>
          Delete output
        </button>
      )}
      {job.is_terminal && (
        <button type="button" class="button quiet" onClick={() => setQuestion("forget")}>
          Forget
        </button>
      )}
      {question && (
        <Question question={question} job={job} onChange={onChange} onClose={() => setQuestion(null)} />
      )}
    </div>
  );
}

function Question({
  question,
  job,
  onChange,
  onClose,
}: ActionsProps & { question: Question; onClose: () => void }) {
  const name = shortUri(job.output_uri);
  const { shards_done: done, shards_total: total, bytes_done } = job.progress;
  if (question === "cancel") {
    const stop = (mode: "orderly" | "now") => ({
      label: mode === "now" ? "End its processes now" : "Cancel in order",
      isDangerous: true,
      run: async () => onChange(await cancelJob(job.id, mode)),
    });
    return (
      <Confirm title={`Cancel the merge into ${name}?`} choices={[stop("orderly"), stop("now")]} onClose={onClose}>
        <p>
          {total > 0
            ? `${done} of ${plural(total, "shard")} are published (${bytes(bytes_done)} moved so far).`
            : "Nothing is written yet."}{" "}
          <code class="break">{job.output_uri}</code> will not become a checkpoint.
        </p>
        <p class="muted">
          In order: workers abort their uploads and keep their connections. Now: worker processes of
          this job are ended; unfinished uploads are swept later.
        </p>
      </Confirm>
    );
  }
  if (question === "retry") {
    const retry = { label: "Retry", run: async () => onChange(await retryJob(job.id)) };
    return (
      <Confirm title={`Retry the merge into ${name}?`} choices={[retry]} onClose={onClose}>
        <p>
          It is queued as attempt {job.attempt + 1}. {plural(done, "published shard")} of {total} are
          kept and not computed again, as long as no input has changed.
        </p>
      </Confirm>
    );
  }
  if (question === "delete" && job.output) return <DeleteOutput job={job} output={job.output} onClose={onClose} />;
  const forget = {
    label: "Forget the job",
    isDangerous: true,
    run: async () => {
      await forgetJob(job.id);
      navigate(href("jobs"));
    },
  };
  return (
    <Confirm title={`Forget the job of ${name}?`} choices={[forget]} onClose={onClose}>
      <p>
        Its record, {plural(total, "shard")} and log are deleted from the service. What it wrote to{" "}
        <code class="break">{job.output_uri}</code> stays.
      </p>
    </Confirm>
  );
}

interface DeleteProps {
  job: JobDetail;
  output: Output;
  onClose: () => void;
}

/** What a merge writes into every checkpoint besides weights and what it copies from an input. */
const ALWAYS = ["config.json", "model.safetensors.index.json", "README.md", "merge_report.json"];

/** Names every file that goes. */
function DeleteOutput({ job, output, onClose }: DeleteProps) {
  const plan = useResource<JobPlan>(`v1/jobs/${job.id}/plan`);
  const checkpoints = output.variants ?? [output];
  const copied = plan.data?.companions ?? [];
  const files = checkpoints.flatMap((checkpoint) => {
    const folder = checkpoint.uri.slice(job.output_uri.length + 1);
    const names = [...checkpoint.files, ...[...copied, ...ALWAYS].map((name) => ({ name, size: null }))];
    return names.map(({ name, size }) => ({ path: folder ? `${folder}/${name}` : name, size }));
  });
  if (output.variants) files.push({ path: "sweep_report.json", size: null });
  const size = files.reduce((sum, file) => sum + (file.size ?? 0), 0);
  const remove = {
    label: `Delete ${plural(files.length, "file")}, ${bytes(size)}`,
    isDangerous: true,
    run: async () => {
      await forgetJob(job.id, "delete");
      navigate(href("jobs"));
    },
  };
  const what = checkpoints.length > 1 ? `${checkpoints.length} checkpoints` : "The checkpoint";
  return (
    <Confirm
      title={`Delete the output ${shortUri(job.output_uri)}?`}
      choices={plan.data ? [remove] : []}
      onClose={onClose}
    >
      {plan.problem && <ProblemNotice problem={plan.problem} />}
      <p>
        {what} in <code class="break">{job.output_uri}</code> {checkpoints.length > 1 ? "go" : "goes"} for good, and with{" "}
        {checkpoints.length > 1 ? "them" : "it"} this job, its log and its merge report:
      </p>
      <ul class="doomed mono" tabIndex={0} aria-label="Files that are deleted">
        {files.map((file) => (
          <li key={file.path}>
            <span class="break">{file.path}</span>
            {file.size !== null && <span class="muted nowrap">{bytes(file.size)}</span>}
          </li>
        ))}
      </ul>
      <p class="muted">
        Other files in that place stay. If another job needs the output, or it is no longer what this job published,
        nothing is removed.
      </p>
    </Confirm>
  );
}
