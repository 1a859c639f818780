import { useState } from "preact/hooks";

import { ApiError } from "../api/client";
import type { Problem } from "../api/types";
import { type Session, logIn } from "../lib/session";
import { Icon } from "../ui/icons";
import { ProblemNotice } from "../ui/parts";

export function LoginPage({ onLogin }: { onLogin: (session: Session) => void }) {
  const [token, setToken] = useState("");
  const [problem, setProblem] = useState<Problem | null>(null);
  const [isBusy, setIsBusy] = useState(false);

  const submit = async (event: Event) => {
    event.preventDefault();
    setIsBusy(true);
    try {
      onLogin(await logIn(token));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setProblem(error.problem);
    } finally {
      setIsBusy(false);
    }
  };
  return (
    <main class="login">
      <form class="card" onSubmit={submit}>
        <h1 class="row">
          <Icon name="logo" size={20} /> Mergeyard
        </h1>
        <label class="field">
          <span>API token</span>
          <input
            class="input mono"
            type="password"
            name="token"
            autocomplete="current-password"
            required
            value={token}
            onInput={(event) => setToken(event.currentTarget.value)}
          />
          <small>
            The first start of the service wrote one to <code>admin-token</code> in its data folder.
          </small>
        </label>
        {problem && <ProblemNotice problem={problem} />}
        <button class="button primary" disabled={isBusy || token.trim() === ""}>
          Log in
        </button>
      </form>
    </main>
  );
}
