/** An event stream as a component has it: followed while the page is looked at. */

import { useEffect, useRef, useState } from "preact/hooks";

import type { Problem } from "../api/types";
import { EventStream, type StreamHandlers, type StreamState } from "./stream";

export interface Live {
  stream: StreamState;
  problem: Problem | null;
  /** When something was last heard. */
  heardAt: number;
  /** Follow again: a job that had ended was retried. */
  restart: () => void;
}

type Handlers<E> = Omit<StreamHandlers<E>, "onState"> & Partial<Pick<StreamHandlers<E>, "onState">>;

export function useStream<E extends { type: string }>(path: string, handlers: Handlers<E>): Live {
  const current = useRef(handlers);
  current.current = handlers;
  const heardAt = useRef(Date.now());
  const [stream, setStream] = useState<StreamState>("connecting");
  const [problem, setProblem] = useState<Problem | null>(null);
  const [round, setRound] = useState(0);
  const isResettable = handlers.onGone !== undefined;

  useEffect(() => {
    setStream("connecting");
    let follower: EventStream<E> | null = null;
    const start = () => {
      follower = new EventStream<E>(path, {
        position: () => current.current.position(),
        onEvents: (events, position) => {
          heardAt.current = Date.now();
          current.current.onEvents(events, position);
        },
        onState: (state, reason) => {
          setStream(state);
          setProblem(reason);
          if (state === "live") heardAt.current = Date.now();
          current.current.onState?.(state, reason);
        },
        ...(isResettable ? { onGone: () => current.current.onGone?.() } : {}),
      });
    };
    // A hidden page gives its connection back: browsers allow six for each server.
    const followVisibility = () => {
      if (document.hidden) {
        follower?.stop();
        follower = null;
      } else if (follower === null) {
        start();
      }
    };
    document.addEventListener("visibilitychange", followVisibility);
    followVisibility();
    return () => {
      document.removeEventListener("visibilitychange", followVisibility);
      follower?.stop();
    };
  }, [path, round, isResettable]);

  const restart = () => setRound((value) => value + 1);
  return { stream, problem, heardAt: heardAt.current, restart };
}
