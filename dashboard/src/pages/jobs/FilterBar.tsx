import { useEffect, useState } from "preact/hooks";

import { JOB_STATES, type JobCounts, type JobState } from "../../api/types";
import { type Filters, type Since, SINCE } from "../../lib/filters";
import { count } from "../../lib/format";
import { setQuery } from "../../lib/router";
import { StateIcon } from "../../ui/icons";

const PAUSE_MILLISECONDS = 250;

/** Filters of the list; each change goes into the address. */
export function FilterBar({ filters, counts }: { filters: Filters; counts: JobCounts | null }) {
  const toggle = (state: JobState) => {
    const states = filters.states.includes(state)
      ? filters.states.filter((item) => item !== state)
      : [...filters.states, state];
    setQuery({ state: states });
  };
  return (
    <div class="filters" role="search">
      <div class="row" role="group" aria-label="States">
        {JOB_STATES.map((state) => (
          <button
            key={state}
            type="button"
            class={`chip toggle s-${state}`}
            aria-pressed={filters.states.includes(state)}
            onClick={() => toggle(state)}
          >
            <span class="state">
              <StateIcon state={state} />
            </span>
            {state} <b class="num">{counts ? count(counts.counts[state]) : "–"}</b>
          </button>
        ))}
      </div>
      <div class="row">
        <label>
          <span class="visually-hidden">Method</span>
          <input
            class="input short"
            placeholder="method"
            value={filters.method}
            onChange={(event) => setQuery({ method: event.currentTarget.value.trim() })}
          />
        </label>
        <label>
          <span class="visually-hidden">Created</span>
          <select
            class="input"
            value={filters.since}
            onChange={(event) => setQuery({ since: event.currentTarget.value })}
          >
            {(Object.keys(SINCE) as Since[]).map((key) => (
              <option key={key} value={key}>
                {SINCE[key]}
              </option>
            ))}
          </select>
        </label>
        <Search text={filters.text} />
        {filters.labels.map(([name, value]) => (
          <button
            key={name}
            type="button"
            class="chip"
            onClick={() => setQuery({ [`label.${name}`]: null })}
          >
            {name}={value} ×<span class="visually-hidden"> remove this filter</span>
          </button>
        ))}
      </div>
    </div>
  );
}

/** Words to search for; they go into the address, and to the service, once writing pauses. */
function Search({ text }: { text: string }) {
  const [written, setWritten] = useState(text);
  useEffect(() => setWritten(text), [text]);
  useEffect(() => {
    if (written === text) return undefined;
    const timer = setTimeout(() => setQuery({ q: written }), PAUSE_MILLISECONDS);
    return () => clearTimeout(timer);
  }, [written]);
  return (
    <label class="grow">
      <span class="visually-hidden">Search all jobs</span>
      <input
        class="input"
        type="search"
        maxLength={200}
        placeholder="search all jobs: id, model, output, label, error"
        value={written}
        onInput={(event) => setWritten(event.currentTarget.value)}
      />
    </label>
  );
}
