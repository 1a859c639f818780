import type { Fault } from "../../api/types";
import { bytes, count, duration, flops } from "../../lib/format";
import { Card, ProblemNotice } from "../../ui/parts";
import { Figure } from "../job/Overview";
import type { Check } from "./useCheck";

export function PlanPreview({ check, hasOutput }: { check: Check; hasOutput: boolean }) {
  const { validation, plan, problem, isBusy } = check;
  const faults = validation?.errors ?? [];
  const warnings = plan?.warnings ?? validation?.warnings ?? [];
  return (
    <Card title="What would happen" aside={<span role="status">{isBusy ? "checking …" : ""}</span>}>
      <div class="stack">
        {faults.length > 0 && <Faults faults={faults} />}
        {problem && <ProblemNotice problem={problem} />}
        {validation?.is_valid && !hasOutput && (
          <p class="muted">The recipe is well formed. Name an output, and the merge is planned from headers.</p>
        )}
        {plan && (
          <>
            <dl class="figures" data-testid="plan">
              <Figure name="To read" value={bytes(plan.bytes_read)} />
              <Figure name="To write" value={bytes(plan.bytes_written)} />
              <Figure name="Arithmetic" value={flops(plan.flops)} />
              <Figure name="Tensors" value={count(plan.tensors)} />
              <Figure name="Shards" value={count(plan.shards)} />
              <Figure name="Largest problem, host" value={bytes(plan.max_host_bytes)} />
              <Figure name="Largest problem, device" value={bytes(plan.max_device_bytes)} />
              {plan.estimate && (
                <Figure
                  name={`Time on ${plan.estimate.slots} ${plan.estimate.device} slots`}
                  value={duration(plan.estimate.total_seconds)}
                />
              )}
            </dl>
            {plan.documents.length > 0 && (
              <p>
                {plan.documents.length} merges, one after another:{" "}
                {plan.documents.map(({ name, method }) => `${name ?? "the result"} (${method})`).join(", ")}
              </p>
            )}
            {plan.variants.length > 0 && (
              <p>
                {plan.variants.length} variants, read once:{" "}
                {plan.variants.map(({ name, method }) => `${name} (${method})`).join(", ")}
              </p>
            )}
            <p class="muted">
              {Object.entries(plan.tensors_by_method)
                .map(([method, number]) => `${count(number)} by ${method}`)
                .join(", ")}
              {plan.companions.length > 0 && `; beside the weights: ${plan.companions.join(", ")}`}
              {!plan.estimate && ". How long it takes is known after a first shard."}
            </p>
          </>
        )}
        {warnings.length > 0 && (
          <ul class="notice">
            {warnings.map((text) => (
              <li key={text} class="break">
                {text}
              </li>
            ))}
          </ul>
        )}
      </div>
    </Card>
  );
}

function Faults({ faults }: { faults: Fault[] }) {
  return (
    <ul class="notice bad" data-testid="faults">
      {faults.map((fault) => (
        <li key={fault.pointer + fault.detail} class="break">
          {fault.pointer && <code>{fault.pointer}</code>} {fault.detail}
        </li>
      ))}
    </ul>
  );
}
