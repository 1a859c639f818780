import { useEffect, useState } from "preact/hooks";

import { ApiError, get, send } from "../../api/client";
import type { Page, Problem, WebhookDelivery, WebhookEndpoint } from "../../api/types";
import { dateTime } from "../../lib/format";
import { useNow, useResource } from "../../lib/resource";
import { setQuery, usePlace } from "../../lib/router";
import { useLive } from "../../live/useLive";
import { Confirm } from "../../ui/Confirm";
import { LiveMark } from "../../ui/LiveMark";
import { Card, Loading, ProblemNotice, TableScroll, Time, ViewBar } from "../../ui/parts";
import { Secret } from "./Tokens";

export function Webhooks() {
  const { query } = usePlace();
  const [numDeliveries, setNumDeliveries] = useState(0);
  const endpoints = useLive({
    key: "",
    read: (signal) => get<Page<WebhookEndpoint>>("v1/webhook-endpoints", signal),
    types: ["webhook.changed", "webhook.deliveries_changed"],
    isNews: (event) => {
      if (event.type === "webhook.changed") return true;
      if (event.subject === query.get("endpoint")) setNumDeliveries((value) => value + 1);
      return false;
    },
  });
  const now = useNow();
  const [made, setMade] = useState<WebhookEndpoint | null>(null);
  const shown = endpoints.data?.data.find((endpoint) => endpoint.id === query.get("endpoint"));
  const changed = (endpoint: WebhookEndpoint | null) => {
    if (endpoint?.secret) setMade(endpoint);
    endpoints.reload();
  };
  return (
    <div class="stack">
      <div class="row spread">
        <h2>Who is told of jobs</h2>
        <LiveMark live={endpoints.live} now={now} />
      </div>
      {made?.secret && <Secret title={`The signing secret of ${made.url}`} secret={made.secret} />}
      {endpoints.problem && <ProblemNotice problem={endpoints.problem} />}
      {!endpoints.data && !endpoints.problem && <Loading what="the endpoints" />}
      {endpoints.data?.data.map((endpoint) => (
        <Endpoint key={endpoint.id} endpoint={endpoint} onChange={changed} isOpen={endpoint === shown} round={numDeliveries} />
      ))}
      {endpoints.data?.data.length === 0 && (
        <p class="card empty">Nobody is told of jobs yet. Messages follow Standard Webhooks and are signed.</p>
      )}
      <NewEndpointForm onMade={changed} />
    </div>
  );
}

interface EndpointProps {
  endpoint: WebhookEndpoint;
  isOpen: boolean;
  /** Another one: its deliveries have changed. */
  round: number;
  onChange: (endpoint: WebhookEndpoint | null) => void;
}

function Endpoint({ endpoint, isOpen, round, onChange }: EndpointProps) {
  const path = `v1/webhook-endpoints/${endpoint.id}`;
  const [question, setQuestion] = useState<"rotate" | "delete" | null>(null);
  const [problem, setProblem] = useState<Problem | null>(null);
  const call = async (method: string, to: string, body?: unknown) => {
    try {
      await send(method, to, body);
      setProblem(null);
      onChange(null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setProblem(error.problem);
    }
  };
  const test = async () => {
    await call("POST", `${path}/test`);
    setQuery({ endpoint: endpoint.id });
  };
  return (
    <Card
      title={<span class="mono break">{endpoint.url}</span>}
      aside={endpoint.is_enabled ? "enabled" : "disabled"}
    >
      <div class="stack">
        {endpoint.flag && <p class="notice bad">{endpoint.flag}</p>}
        {endpoint.paused_until && <p class="notice">It asked for patience until {dateTime(endpoint.paused_until)}.</p>}
        <p class="muted">
          {endpoint.description && `${endpoint.description}. `}
          Told of {endpoint.events.join(", ")}; {endpoint.format} envelope; since <Time at={endpoint.created_at} />.
        </p>
        <div class="row">
          <button type="button" class="button" onClick={test}>
            Send a test
          </button>
          <button
            type="button"
            class="button"
            onClick={() => setQuery({ endpoint: isOpen ? null : endpoint.id })}
            aria-expanded={isOpen}
          >
            Deliveries
          </button>
          <button type="button" class="button" onClick={() => call("PATCH", path, { is_enabled: !endpoint.is_enabled })}>
            {endpoint.is_enabled ? "Disable" : "Enable"}
          </button>
          <button type="button" class="button" onClick={() => setQuestion("rotate")}>
            Replace its secret
          </button>
          <button type="button" class="button danger" onClick={() => setQuestion("delete")}>
            Forget
          </button>
        </div>
        {problem && <ProblemNotice problem={problem} />}
        {isOpen && <Deliveries path={path} round={round} />}
      </div>
      {question === "rotate" && (
        <Confirm
          title="Replace the signing secret?"
          choices={[{ label: "Replace it", run: async () => onChange(await send("POST", `${path}/rotate-secret`)) }]}
          onClose={() => setQuestion(null)}
        >
          <p>For a day messages to {endpoint.url} carry a signature of each, the new secret and the old one.</p>
        </Confirm>
      )}
      {question === "delete" && (
        <Confirm
          title="Forget this endpoint?"
          choices={[{ label: "Forget it", isDangerous: true, run: () => call("DELETE", path) }]}
          onClose={() => setQuestion(null)}
        >
          <p>
            <code class="break">{endpoint.url}</code> is told of nothing any more; deliveries that wait for it and their
            history are deleted.
          </p>
        </Confirm>
      )}
    </Card>
  );
}

function Deliveries({ path, round }: { path: string; round: number }) {
  const list = useResource<Page<WebhookDelivery>>(`${path}/deliveries?limit=50`);
  useEffect(list.reload, [round]);
  if (list.problem) return <ProblemNotice problem={list.problem} />;
  if (!list.data) return <Loading what="the deliveries" />;
  const replay = async (delivery: WebhookDelivery) => {
    await send("POST", `${path}/deliveries/${delivery.id}/replay`);
    list.reload();
  };
  return (
    <>
      <div class="row spread">
        <h3>Deliveries of the last thirty days, newest first</h3>
        <ViewBar path={`${path}/deliveries`} />
      </div>
      <TableScroll label="Deliveries">
        <thead>
          <tr>
            <th>Type</th>
            <th>State</th>
            <th class="num-col">Tries</th>
            <th>Last answer</th>
            <th>Made</th>
            <th>Next try</th>
            <th>
              <span class="visually-hidden">Actions</span>
            </th>
          </tr>
        </thead>
        <tbody>
          {list.data.data.map((delivery) => (
            <tr key={delivery.id}>
              <td class="mono">{delivery.type}</td>
              <td>{delivery.state}</td>
              <td class="num-col">{delivery.attempts}</td>
              <td class="break" title={delivery.response_body ?? ""}>
                {[delivery.response_status, delivery.error].filter(Boolean).join(" ") || "–"}
              </td>
              <td>
                <Time at={delivery.created_at} />
              </td>
              <td>{delivery.due_at ? <Time at={delivery.due_at} /> : "–"}</td>
              <td class="right">
                <button type="button" class="button small" onClick={() => replay(delivery)}>
                  Send again
                </button>
              </td>
            </tr>
          ))}
        </tbody>
      </TableScroll>
      {list.data.data.length === 0 && <p class="muted">Nothing was sent yet.</p>}
    </>
  );
}

function NewEndpointForm({ onMade }: { onMade: (endpoint: WebhookEndpoint) => void }) {
  const [url, setUrl] = useState("");
  const [format, setFormat] = useState("standard");
  const [problem, setProblem] = useState<Problem | null>(null);
  const make = async (event: Event) => {
    event.preventDefault();
    try {
      onMade(await send<WebhookEndpoint>("POST", "v1/webhook-endpoints", { url, format }));
      setUrl("");
      setProblem(null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setProblem(error.problem);
    }
  };
  return (
    <Card title="New webhook endpoint">
      <form class="stack" onSubmit={make}>
        <div class="fields address">
          <label class="field">
            <span>Address</span>
            <input
              class="input mono"
              required
              placeholder="https://hooks.example.org/merges"
              value={url}
              onInput={(event) => setUrl(event.currentTarget.value)}
            />
          </label>
          <label class="field">
            <span>Envelope</span>
            <select class="input" value={format} onChange={(event) => setFormat(event.currentTarget.value)}>
              <option value="standard">Standard Webhooks</option>
              <option value="cloudevents">CloudEvents 1.0</option>
            </select>
          </label>
        </div>
        {problem && <ProblemNotice problem={problem} />}
        <p>
          <button class="button primary" disabled={url === ""}>
            Make the endpoint
          </button>
        </p>
      </form>
    </Card>
  );
}
