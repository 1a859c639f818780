import { JOB_STATES, type JobCounts, type JobState } from "../../api/types";
import { type Filters, type Since, SINCE } from "../../lib/filters";
import { count } from "../../lib/format";
import { setQuery } from "../../lib/router";
import { StateIcon } from "../../ui/icons";

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
        <label class="grow">
          <span class="visually-hidden">Search in what is listed</span>
          <input
            class="input"
            type="search"
            placeholder="search id, model, output, label"
            value={filters.text}
            onInput={(event) => setQuery({ q: event.currentTarget.value })}
          />
        </label>
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
