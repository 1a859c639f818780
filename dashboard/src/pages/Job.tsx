/** One job: its state and progress always in sight, below them one of several tabs. */

import type { ComponentType } from "preact";
import { useEffect } from "preact/hooks";

import type { JobDetail, JobPlan, Report } from "../api/types";
import { shortUri } from "../lib/format";
import { useNow, useResource } from "../lib/resource";
import { Link, href, usePlace } from "../lib/router";
import { stateSentence } from "../lib/words";
import { currentJob } from "../live/current";
import type { JobView } from "../live/fold";
import { type LiveJob, useJobView } from "../live/useJobView";
import { LiveMark } from "../ui/LiveMark";
import { Loading, ProblemNotice, StateBadge, ViewBar } from "../ui/parts";
import { Actions } from "./job/Actions";
import { EventsTab } from "./job/Events";
import { ErrorCard, Phases, ProgressCard, Warnings } from "./job/Head";
import { Overview } from "./job/Overview";
import { RecipeTab } from "./job/Recipe";
import { ReportTab } from "./job/Report";
import { ShardsTab } from "./job/Shards";

export interface TabProps {
  job: JobDetail;
  view: JobView;
  version: number;
  plan: JobPlan | null;
  report: Report | null;
  now: number;
}

interface Tab {
  name: string;
  label: string;
  page: ComponentType<TabProps>;
  /** Address of its JSON, below the job's. */
  json: string;
}

const TABS: Tab[] = [
  { name: "", label: "Overview", page: Overview, json: "" },
  { name: "shards", label: "Shards", page: ShardsTab, json: "/shards" },
  { name: "report", label: "Merge report", page: ReportTab, json: "/report" },
  { name: "recipe", label: "Recipe & lineage", page: RecipeTab, json: "" },
  { name: "events", label: "Log", page: EventsTab, json: "/events" },
];

export function JobPage({ id }: { id: string }) {
  const live = useJobView(id);
  const { view, version } = live;
  const resource = useResource<JobDetail>(`v1/jobs/${id}`);
  const job = resource.data && currentJob(resource.data, view);
  // What events do not say in full is read again when one of them says that it changed.
  useEffect(() => {
    if (view.milestones > 0) resource.reload();
  }, [view.milestones]);
  const hasPlan = job?.plan_digest != null || (job?.progress.shards_total ?? 0) > 0;
  const plan = useResource<JobPlan>(hasPlan ? `v1/jobs/${id}/plan` : null);
  const report = useResource<Report>(job?.state === "succeeded" ? `v1/jobs/${id}/report` : null);
  const now = useNow(1);

  if (resource.problem && !job) return <ProblemNotice problem={resource.problem} />;
  if (!job) return <Loading what="the job" />;
  const props = { job, view, version, plan: plan.data, report: report.data, now };
  return (
    <div class={`stack s-${job.state}`}>
      <Head {...props} live={live} onChange={resource.set} />
      <Tabs id={id} {...props} />
    </div>
  );
}

interface HeadProps extends TabProps {
  live: LiveJob;
  onChange: (job: JobDetail) => void;
}

function Head({ job, view, version, plan, now, live, onChange }: HeadProps) {
  const { query } = usePlace();
  const tab = TABS.find((item) => item.name === (query.get("tab") ?? "")) ?? TABS[0]!;
  const changed = (next: JobDetail) => {
    onChange(next);
    live.restart();
  };
  return (
    <>
      <div class="row spread">
        <div class="row">
          <h1 class="break">{shortUri(job.output_uri)}</h1>
          <StateBadge state={job.state} />
          {job.attempt > 1 && <span class="chip">attempt {job.attempt}</span>}
          <code class="muted break">{job.id}</code>
        </div>
        <div class="row">
          <LiveMark live={live} now={now} />
          <ViewBar path={`v1/jobs/${job.id}${tab.json}`} />
          <Actions job={job} onChange={changed} />
        </div>
      </div>
      <p class="sentence break" data-testid="sentence">
        {stateSentence(job, view, now)}
      </p>
      {job.error && <ErrorCard problem={job.error} />}
      <ProgressCard job={job} view={view} version={version} plan={plan} now={now} />
      <Phases phases={job.phases} now={now} isBroken={job.state === "failed" || job.state === "cancelled"} />
      <Warnings warnings={job.warnings} more={view.warnings} />
    </>
  );
}

function Tabs({ id, ...props }: TabProps & { id: string }) {
  const { query } = usePlace();
  const current = query.get("tab") ?? "";
  const tab = TABS.find((item) => item.name === current) ?? TABS[0]!;
  return (
    <>
      <nav class="tabs" aria-label="Parts of the job">
        {TABS.map(({ name, label }) => (
          <Link key={name} to={href(`jobs/${id}`, { tab: name })} isCurrent={name === tab.name}>
            {label}
          </Link>
        ))}
      </nav>
      <tab.page {...props} />
    </>
  );
}
