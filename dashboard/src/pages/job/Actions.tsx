import { useState } from "preact/hooks";

import { cancelJob, forgetJob, retryJob } from "../../api/actions";
import type { JobDetail } from "../../api/types";
import { bytes, plural, shortUri } from "../../lib/format";
import { Link, href, navigate } from "../../lib/router";
import { may, useSession } from "../../lib/session";
import { Confirm } from "../../ui/Confirm";

type Question = "cancel" | "retry" | "forget";

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
