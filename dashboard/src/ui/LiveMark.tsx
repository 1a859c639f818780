/** Whether what is shown is what is. */

import { age } from "../lib/format";
import type { Live } from "../live/useStream";
import { Icon } from "./icons";

export function LiveMark({ live, now }: { live: Live; now: number }) {
  const { stream, problem, heardAt } = live;
  const heard = age(now - heardAt);
  if (stream === "lost" || stream === "refused") {
    return (
      <span class="live lost" role="status">
        <Icon name="warning" size={13} />
        {problem ? `Not live: ${problem.detail}` : `Connection lost ${heard}; trying again`}
      </span>
    );
  }
  const words = {
    connecting: "connecting …",
    live: `live, last update ${heard}`,
    ended: "the job has ended",
  }[stream];
  return (
    <span class={`live is-${stream}`} data-testid="live">
      {words}
    </span>
  );
}
