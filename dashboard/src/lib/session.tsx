/** Who is logged in. The cookie is out of reach of scripts; the service is asked. */

import { createContext } from "preact";
import { useContext } from "preact/hooks";

import { request, send } from "../api/client";

export interface Session {
  token_id: string;
  token_name: string;
  scopes: string[];
  expires_at: string | null;
}

export const SessionContext = createContext<Session | null>(null);

export function useSession(): Session {
  const session = useContext(SessionContext);
  if (session === null) throw new Error("only pages behind the login ask");
  return session;
}

export function may(session: Session, scope: string): boolean {
  return session.scopes.includes(scope) || session.scopes.includes("admin");
}

/** Exchange a token for a session. The token itself is not kept. */
export async function logIn(token: string): Promise<Session> {
  const headers = { Authorization: `Bearer ${token.trim()}` };
  const response = await request("v1/sessions", { method: "POST", headers });
  return (await response.json()) as Session;
}

export function logOut(): Promise<void> {
  return send("DELETE", "v1/sessions/current");
}
