import { useState } from "preact/hooks";

import { ApiError, get, send } from "../../api/client";
import type { NewToken, Page, Problem, Token } from "../../api/types";
import { useNow } from "../../lib/resource";
import { useLive } from "../../live/useLive";
import { Confirm } from "../../ui/Confirm";
import { LiveMark } from "../../ui/LiveMark";
import { Card, Copy, Loading, ProblemNotice, TableScroll, Time } from "../../ui/parts";

const SCOPES: [name: string, meaning: string][] = [
  ["jobs:read", "read jobs, events, reports, methods"],
  ["jobs:write", "plan, submit, cancel, retry, forget"],
  ["output:delete", "remove merged checkpoints (with jobs:write)"],
  ["webhooks:write", "webhook endpoints and their deliveries"],
  ["metrics:read", "/metrics for Prometheus"],
  ["admin", "all of these, and tokens"],
];

export function Tokens() {
  const tokens = useLive({
    key: "",
    read: (signal) => get<Page<Token>>("v1/tokens", signal),
    types: ["token.changed"],
    isNews: () => true,
  });
  const now = useNow();
  const [made, setMade] = useState<NewToken | null>(null);
  const [revoking, setRevoking] = useState<Token | null>(null);
  const added = (token: NewToken) => {
    setMade(token);
    tokens.reload();
  };
  return (
    <div class="stack">
      {made && <Secret title={`The token ${made.name}`} secret={made.secret} />}
      {tokens.problem && <ProblemNotice problem={tokens.problem} />}
      {tokens.data ? (
        <Card title="Tokens" aside={<LiveMark live={tokens.live} now={now} />} flush>
          <TableScroll label="Tokens">
            <thead>
              <tr>
                <th>Name</th>
                <th>Begins with</th>
                <th>Scopes</th>
                <th>Made</th>
                <th>Last used</th>
                <th>Ends</th>
                <th>
                  <span class="visually-hidden">Actions</span>
                </th>
              </tr>
            </thead>
            <tbody>
              {tokens.data.data.map((token) => (
                <tr key={token.id}>
                  <td>{token.name}</td>
                  <td class="mono">{token.prefix}…</td>
                  <td class="mono">{token.scopes.join(", ")}</td>
                  <td>
                    <Time at={token.created_at} />
                  </td>
                  <td>{token.last_used_at ? <Time at={token.last_used_at} /> : "never"}</td>
                  <td>{ending(token)}</td>
                  <td class="right">
                    {!token.revoked_at && (
                      <button type="button" class="button small danger" onClick={() => setRevoking(token)}>
                        Revoke
                      </button>
                    )}
                  </td>
                </tr>
              ))}
            </tbody>
          </TableScroll>
        </Card>
      ) : (
        !tokens.problem && <Loading what="the tokens" />
      )}
      <NewTokenForm onMade={added} />
      {revoking && (
        <Confirm
          title={`Revoke the token ${revoking.name}?`}
          choices={[
            {
              label: "Revoke it",
              isDangerous: true,
              run: async () => {
                await send("DELETE", `v1/tokens/${revoking.id}`);
                tokens.reload();
              },
            },
          ]}
          onClose={() => setRevoking(null)}
        >
          <p>
            Whatever sends <code>{revoking.prefix}…</code> is refused from now on, browsers that are logged in with it
            included. This cannot be undone.
          </p>
        </Confirm>
      )}
    </div>
  );
}

function ending(token: Token): preact.ComponentChildren {
  if (token.revoked_at) {
    return (
      <>
        revoked <Time at={token.revoked_at} />
      </>
    );
  }
  return token.expires_at ? <Time at={token.expires_at} /> : "never";
}

/** Something that is shown once. */
export function Secret({ title, secret }: { title: string; secret: string }) {
  return (
    <div class="notice" role="status">
      <b>{title}. It is shown this once:</b>
      <div class="row">
        <code class="break" data-testid="secret">
          {secret}
        </code>
        <Copy text={secret} label="Copy the secret">
          copy
        </Copy>
      </div>
    </div>
  );
}

function NewTokenForm({ onMade }: { onMade: (token: NewToken) => void }) {
  const [name, setName] = useState("");
  const [scopes, setScopes] = useState<string[]>(["jobs:read"]);
  const [days, setDays] = useState("");
  const [problem, setProblem] = useState<Problem | null>(null);
  const toggle = (scope: string) =>
    setScopes(scopes.includes(scope) ? scopes.filter((item) => item !== scope) : [...scopes, scope]);
  const make = async (event: Event) => {
    event.preventDefault();
    const expires = days ? new Date(Date.now() + Number(days) * 86_400_000).toISOString() : null;
    try {
      onMade(await send<NewToken>("POST", "v1/tokens", { name, scopes, expires_at: expires }));
      setName("");
      setProblem(null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setProblem(error.problem);
    }
  };
  return (
    <Card title="New token">
      <form class="stack" onSubmit={make}>
        <div class="fields">
          <label class="field">
            <span>Name</span>
            <input
              class="input"
              required
              maxLength={100}
              value={name}
              placeholder="nightly merges"
              onInput={(event) => setName(event.currentTarget.value)}
            />
          </label>
          <label class="field">
            <span>Valid for days</span>
            <input
              class="input"
              type="number"
              min="1"
              max="3650"
              placeholder="until revoked"
              value={days}
              onInput={(event) => setDays(event.currentTarget.value)}
            />
          </label>
        </div>
        <fieldset class="scopes">
          <legend>Scopes</legend>
          {SCOPES.map(([scope, meaning]) => (
            <label key={scope}>
              <input type="checkbox" checked={scopes.includes(scope)} onChange={() => toggle(scope)} />
              <code>{scope}</code> <span class="muted">{meaning}</span>
            </label>
          ))}
        </fieldset>
        {problem && <ProblemNotice problem={problem} />}
        <p>
          <button class="button primary" disabled={name === "" || scopes.length === 0}>
            Make the token
          </button>
        </p>
      </form>
    </Card>
  );
}
