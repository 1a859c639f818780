/** Requests to the public API, relative to where the server says the pages live (`<base>`). */

import type { Problem } from "./types";

/** Path of the service as this browser sees it, with a slash at its end. */
export const BASE = new URL(".", globalThis.document?.baseURI ?? "http://localhost/").pathname;

/** A request that failed; `problem` says how. */
export class ApiError extends Error {
  constructor(readonly problem: Problem) {
    super(problem.detail);
  }
}

export function apiUrl(path: string): string {
  return path.startsWith(BASE + "v1/") ? path : BASE + path.replace(/^\//, "");
}

type OnUnauthenticated = () => void;
let onUnauthenticated: OnUnauthenticated = () => undefined;

/** Called whenever the service says that nobody is logged in. */
export function watchSession(callback: OnUnauthenticated): void {
  onUnauthenticated = callback;
}

export interface RequestOptions {
  method?: string;
  body?: unknown;
  signal?: AbortSignal;
  headers?: Record<string, string>;
}

/** Send a request; an answer that is no success becomes an {@link ApiError}. */
export async function request(path: string, options: RequestOptions = {}): Promise<Response> {
  const headers: Record<string, string> = { Accept: "application/json", ...options.headers };
  if (options.body !== undefined) headers["Content-Type"] = "application/json";
  let response: Response;
  try {
    response = await fetch(apiUrl(path), {
      method: options.method ?? "GET",
      headers,
      credentials: "same-origin",
      ...(options.body === undefined ? {} : { body: JSON.stringify(options.body) }),
      ...(options.signal ? { signal: options.signal } : {}),
    });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError(unreachable());
  }
  if (response.ok) return response;
  const problem = await readProblem(response);
  if (problem.code === "unauthenticated") onUnauthenticated();
  throw new ApiError(problem);
}

export async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  const response = await request(path, signal ? { signal } : {});
  return (await response.json()) as T;
}

export async function send<T>(method: string, path: string, body?: unknown): Promise<T> {
  const response = await request(path, { method, body });
  return (response.status === 204 ? undefined : await response.json()) as T;
}

export async function readProblem(response: Response): Promise<Problem> {
  try {
    const body = (await response.json()) as Problem;
    if (typeof body.code === "string") return body;
  } catch {
    // Not ours: a proxy answered. What follows says so.
  }
  return {
    title: "Unexpected answer",
    status: response.status,
    code: "unexpected_answer",
    detail: `The service answered ${response.status} without saying why. Is a proxy in between?`,
    retryable: response.status >= 500,
  };
}

function unreachable(): Problem {
  return {
    title: "Unreachable",
    status: 0,
    code: "unreachable",
    detail: "The service does not answer. Check that it runs and that the network is up.",
    retryable: true,
  };
}
