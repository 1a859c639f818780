/** A question before something is done; says what exactly happens to what. */

import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";

import { ApiError } from "../api/client";
import type { Problem } from "../api/types";
import { ProblemNotice } from "./parts";

export interface Choice {
  label: string;
  isDangerous?: boolean;
  run: () => Promise<unknown>;
}

interface ConfirmProps {
  title: string;
  children: ComponentChildren;
  choices: Choice[];
  onClose: () => void;
}

export function Confirm({ title, children, choices, onClose }: ConfirmProps) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [problem, setProblem] = useState<Problem | null>(null);
  const [isBusy, setIsBusy] = useState(false);

  useEffect(() => dialog.current?.showModal(), []);

  const choose = async (choice: Choice) => {
    setIsBusy(true);
    try {
      await choice.run();
      onClose();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setProblem(error.problem);
      setIsBusy(false);
    }
  };
  return (
    <dialog ref={dialog} onClose={onClose} aria-labelledby="confirm-title">
      <form method="dialog">
        <h2 id="confirm-title">{title}</h2>
        {children}
        {problem && <ProblemNotice problem={problem} />}
        <div class="row">
          <button class="button quiet" value="close">
            Go back
          </button>
          {choices.map((choice) => (
            <button
              key={choice.label}
              type="button"
              class={choice.isDangerous ? "button danger" : "button primary"}
              disabled={isBusy}
              onClick={() => choose(choice)}
            >
              {choice.label}
            </button>
          ))}
        </div>
      </form>
    </dialog>
  );
}
