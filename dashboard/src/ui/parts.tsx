/** The few pieces that every page is made of. */

import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";

import { apiUrl } from "../api/client";
import type { JobState, Problem } from "../api/types";
import { age, dateTime } from "../lib/format";
import { Icon, StateIcon } from "./icons";

export function StateBadge({ state }: { state: JobState }) {
  return (
    <span class={`state s-${state}`}>
      <StateIcon state={state} />
      {state}
    </span>
  );
}

interface CardProps {
  title: ComponentChildren;
  aside?: ComponentChildren;
  children: ComponentChildren;
  flush?: boolean;
  class?: string;
}

export function Card({ title, aside, children, flush, class: extra }: CardProps) {
  return (
    <section class={`card ${extra ?? ""}`}>
      <header>
        <h2>{title}</h2>
        {aside !== undefined && <div class="aside">{aside}</div>}
      </header>
      {flush ? children : <div class="body">{children}</div>}
    </section>
  );
}

/** Time as people near it say it; the exact one, in UTC too, on hover. */
export function Time({ at, now }: { at: string; now?: number }) {
  const text = now === undefined ? dateTime(at) : age(now - Date.parse(at));
  return (
    <time dateTime={at} title={`${dateTime(at)} here, ${at} UTC`} class="num">
      {text}
    </time>
  );
}

interface CopyProps {
  text: string;
  label: string;
  children?: ComponentChildren;
}

/** Copies text; says so for two seconds. */
export function Copy({ text, label, children }: CopyProps) {
  const [isDone, setIsDone] = useState(false);
  useEffect(() => {
    if (!isDone) return undefined;
    const timer = setTimeout(() => setIsDone(false), 2000);
    return () => clearTimeout(timer);
  }, [isDone]);
  const copy = async () => {
    await copyText(text);
    setIsDone(true);
  };
  return (
    <button type="button" class="button quiet small" title={label} aria-label={label} onClick={copy}>
      <Icon name={isDone ? "check" : "copy"} size={13} />
      {children}
      <span class="visually-hidden" role="status">
        {isDone ? "copied" : ""}
      </span>
    </button>
  );
}

/** The clipboard's own interface exists over https and on loopback only. */
async function copyText(text: string): Promise<void> {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

export function curlCommand(path: string, origin = location.origin): string {
  return `curl -H "Authorization: Bearer $MERGEYARD_TOKEN" '${origin}${apiUrl(path)}'`;
}

/** The same view for programs: its JSON, and the command that reads it. */
export function ViewBar({ path }: { path: string }) {
  return (
    <span class="viewbar">
      <a class="button quiet small" href={apiUrl(path)} title="This view's JSON">
        <Icon name="json" size={13} /> JSON
      </a>
      <Copy text={curlCommand(path)} label="Copy this view as a curl command">
        curl
      </Copy>
    </span>
  );
}

export function ProblemNotice({ problem, title }: { problem: Problem; title?: string }) {
  return (
    <div class="notice bad" role="alert">
      <strong>{title ?? problem.title}</strong>
      <p class="break">{problem.detail}</p>
      {problem.errors && problem.errors.length > 1 && (
        <ul>
          {problem.errors.map((fault) => (
            <li key={fault.pointer + fault.detail} class="break">
              <code>{fault.pointer}</code> {fault.detail}
            </li>
          ))}
        </ul>
      )}
      {problem.request_id && (
        <p class="muted">
          <code>{problem.code}</code> · request <code>{problem.request_id}</code>
        </p>
      )}
    </div>
  );
}

interface BarProps {
  done: number;
  total: number;
  label: string;
  isTall?: boolean;
}

export function Bar({ done, total, label, isTall }: BarProps) {
  const share = total > 0 ? Math.min(done / total, 1) : 0;
  return (
    <div
      class={isTall ? "bar tall" : "bar"}
      role="progressbar"
      aria-label={label}
      aria-valuemin={0}
      aria-valuemax={100}
      aria-valuenow={Math.round(share * 100)}
    >
      <i style={{ width: `${share * 100}%` }} />
    </div>
  );
}

export function Loading({ what }: { what: string }) {
  return (
    <p class="empty" role="status">
      Reading {what} …
    </p>
  );
}

interface TableProps {
  label: string;
  children: ComponentChildren;
  class?: string;
}

/** A table that scrolls in itself where it is too wide, also by keyboard. */
export function TableScroll({ label, children, class: extra = "" }: TableProps) {
  return (
    <div class={`table-scroll ${extra}`} role="region" aria-label={label} tabIndex={0}>
      <table>{children}</table>
    </div>
  );
}
