import type { ComponentType } from "preact";

import type { Version } from "../api/types";
import { useResource } from "../lib/resource";
import { Link, href, usePlace } from "../lib/router";
import { may, useSession } from "../lib/session";
import { Card, ProblemNotice, Time, ViewBar } from "../ui/parts";
import { Tokens } from "./settings/Tokens";
import { Webhooks } from "./settings/Webhooks";

interface Part {
  name: string;
  label: string;
  scope: string;
  page: ComponentType;
  json: string;
}

const PARTS: Part[] = [
  { name: "", label: "Tokens", scope: "admin", page: Tokens, json: "v1/tokens" },
  {
    name: "webhooks",
    label: "Webhooks",
    scope: "webhooks:write",
    page: Webhooks,
    json: "v1/webhook-endpoints",
  },
  { name: "about", label: "This service", scope: "", page: About, json: "v1/version" },
];

export function SettingsPage() {
  const { query } = usePlace();
  const session = useSession();
  const part = PARTS.find((item) => item.name === (query.get("tab") ?? "")) ?? PARTS[0]!;
  const isAllowed = part.scope === "" || may(session, part.scope);
  return (
    <div class="stack">
      <div class="row spread">
        <h1>Settings</h1>
        <ViewBar path={part.json} />
      </div>
      <nav class="tabs" aria-label="Parts of the settings">
        {PARTS.map(({ name, label }) => (
          <Link key={name} to={href("settings", { tab: name })} isCurrent={name === part.name}>
            {label}
          </Link>
        ))}
      </nav>
      {isAllowed ? (
        <part.page />
      ) : (
        <p class="empty">
          This needs the scope {part.scope}; the token {session.token_name} has {session.scopes.join(", ")}.
        </p>
      )}
    </div>
  );
}

function About() {
  const version = useResource<Version>("v1/version");
  const session = useSession();
  if (version.problem) return <ProblemNotice problem={version.problem} />;
  return (
    <Card title="This service">
      <dl class="facts">
        <dt>Mergeyard</dt>
        <dd class="mono">{version.data?.version}</dd>
        {Object.entries(version.data?.packages ?? {}).map(([name, number]) => (
          <>
            <dt>{name}</dt>
            <dd class="mono">{number}</dd>
          </>
        ))}
        <dt>Logged in with</dt>
        <dd>
          {session.token_name} ({session.scopes.join(", ")})
        </dd>
        {session.expires_at && (
          <>
            <dt>Until</dt>
            <dd>
              <Time at={session.expires_at} />
            </dd>
          </>
        )}
      </dl>
    </Card>
  );
}
