import { useState } from "preact/hooks";

import { apiUrl } from "../../api/client";
import { clock, count } from "../../lib/format";
import { eventSentence, isBad } from "../../lib/words";
import { Card } from "../../ui/parts";
import type { TabProps } from "../Job";

const STEP = 500;

/** Everything that happened, newest first; each line opens to the event as programs see it. */
export function EventsTab({ job, view }: TabProps) {
  const [text, setText] = useState("");
  const [most, setMost] = useState(STEP);
  const words = text.toLowerCase();
  const found = view.events
    .map((event) => ({ event, sentence: eventSentence(event) }))
    .filter(({ event, sentence }) => `${event.type} ${sentence}`.toLowerCase().includes(words))
    .reverse();
  return (
    <Card
      title={`${count(found.length)} events`}
      flush
      aside={
        <span class="row">
          <a href={apiUrl(`v1/jobs/${job.id}/logs`)}>as text</a>
          <input
            class="input"
            type="search"
            placeholder="search the log"
            aria-label="Search the log"
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
          />
        </span>
      }
    >
      <ol class="log" tabIndex={0} aria-label="Events, newest first">
        {found.slice(0, most).map(({ event, sentence }) => (
          <li key={event.seq} class={isBad(event) ? "bad" : ""}>
            <time dateTime={event.time} title={event.time}>
              {clock(event.time)}
            </time>
            <span class="seq">{event.seq}</span>
            <details>
              <summary class="break">{sentence}</summary>
              <pre class="code">{JSON.stringify(event, null, 2)}</pre>
            </details>
          </li>
        ))}
      </ol>
      {found.length > most && (
        <p class="row body">
          <button type="button" class="button" onClick={() => setMost(most + STEP)}>
            Older events
          </button>
        </p>
      )}
    </Card>
  );
}
