/** Whether what is shown is what is. */

import { duration } from "../lib/format";
import type { Live } from "../live/useStream";
import { Icon } from "./icons";

export function LiveMark({ live, now }: { live: Live; now: number }) {
  const { stream, problem, heardAt } = live;
  const silent = duration(Math.max(0, Math.round((now - heardAt) / 1000)));
  if (stream === "lost" || stream === "refused") {
    return (
      <span class="live lost" role="status">
        <Icon name="warning" size={13} />
        {problem ? `Not live: ${problem.detail}` : `Connection lost ${silent} ago; trying again`}
      </span>
    );
  }
  const words = {
    connecting: "connecting …",
    live: `live, last update ${silent} ago`,
    ended: "not live: the job has ended",
  }[stream];
  return (
    <span class="live" data-testid="live">
      {words}
    </span>
  );
}
