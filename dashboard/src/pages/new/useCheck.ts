/** What the service says of a recipe while it is written: first its form, then the plan. */

import { useEffect, useState } from "preact/hooks";

import { type Submission, planMerge, validateRecipe } from "../../api/actions";
import { ApiError } from "../../api/client";
import type { Plan, Problem, RecipeValidation } from "../../api/types";

const PAUSE_MILLISECONDS = 350;

export interface Check {
  validation: RecipeValidation | null;
  plan: Plan | null;
  problem: Problem | null;
  isBusy: boolean;
  /** The plan is of exactly what would be submitted now. */
  isCurrent: boolean;
}

const NOTHING = { validation: null, plan: null, problem: null };

export function useCheck(submission: Submission): Check {
  const key = JSON.stringify([submission.recipe, submission.output_uri, submission.options]);
  const [result, setResult] = useState<Omit<Check, "isBusy" | "isCurrent"> & { key: string }>({ ...NOTHING, key: "" });

  useEffect(() => {
    let isStale = false;
    const check = async () => {
      let found: Omit<Check, "isBusy" | "isCurrent"> = NOTHING;
      try {
        const validation = await validateRecipe(submission.recipe);
        found = { ...NOTHING, validation };
        if (validation.is_valid && submission.output_uri && !isStale) {
          found = { ...found, plan: await planMerge(submission) };
        }
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        found = { ...found, problem: error.problem };
      }
      if (!isStale) setResult({ ...found, key });
    };
    const timer = setTimeout(() => void check(), PAUSE_MILLISECONDS);
    return () => {
      isStale = true;
      clearTimeout(timer);
    };
  }, [key]);

  const isCurrent = result.key === key;
  return { ...result, isBusy: !isCurrent, isCurrent: isCurrent && result.plan !== null };
}
