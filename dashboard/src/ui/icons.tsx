/** Small drawings. Each state has a shape of its own, so that colour is never the only sign. */

import type { JobState } from "../api/types";

const SHAPES: Record<JobState, preact.JSX.Element> = {
  queued: <circle cx="6" cy="6" r="4.5" stroke-dasharray="2.2 1.6" />,
  planning: (
    <>
      <circle cx="6" cy="6" r="4.5" />
      <path d="M6 6V1.5A4.5 4.5 0 0 1 10.5 6Z" fill="currentColor" />
    </>
  ),
  running: (
    <>
      <circle cx="6" cy="6" r="4.5" />
      <path d="M6 1.5a4.5 4.5 0 0 1 0 9Z" fill="currentColor" />
    </>
  ),
  publishing: (
    <>
      <circle cx="6" cy="6" r="4.5" />
      <path d="M6 6V1.5A4.5 4.5 0 1 1 1.5 6Z" fill="currentColor" />
    </>
  ),
  succeeded: (
    <>
      <circle cx="6" cy="6" r="5.2" fill="currentColor" stroke="none" />
      <path d="M3.6 6.2 5.3 8l3.2-3.8" class="knock" />
    </>
  ),
  failed: (
    <>
      <rect x="0.8" y="0.8" width="10.4" height="10.4" rx="2" fill="currentColor" stroke="none" />
      <path d="m4 4 4 4M8 4 4 8" class="knock" />
    </>
  ),
  cancelling: (
    <>
      <circle cx="6" cy="6" r="4.5" stroke-dasharray="2.2 1.6" />
      <path d="M3.5 6h5" />
    </>
  ),
  cancelled: (
    <>
      <circle cx="6" cy="6" r="4.5" />
      <path d="M3.5 6h5" />
    </>
  ),
};

export function StateIcon({ state, size = 12 }: { state: JobState; size?: number }) {
  return (
    <svg
      width={size}
      height={size}
      viewBox="0 0 12 12"
      fill="none"
      stroke="currentColor"
      stroke-width="1.4"
      aria-hidden="true"
    >
      {SHAPES[state] ?? SHAPES.queued}
    </svg>
  );
}

const GLYPHS = {
  logo: "M2 3c5 0 4 5 8 5h4M2 13c5 0 4-5 8-5M2 8h4",
  sun: "M8 4.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7ZM8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M3 13l1-1M12 4l1-1",
  moon: "M13 9.5A5.5 5.5 0 0 1 6.5 3 5.5 5.5 0 1 0 13 9.5Z",
  copy: "M5.5 5.5h7v8h-7zM3.5 10.5v-8h7",
  check: "m3 8.5 3 3 7-7",
  json: "M6 2.5c-2 0-1.5 2-1.5 3S4 8 2.5 8C4 8 4.5 9.5 4.5 10.5s-.5 3 1.5 3M10 2.5c2 0 1.5 2 1.5 3S12 8 13.5 8c-1.5 0-2 1.5-2 2.5s.5 3-1.5 3",
  arrow: "M3 8h10M9 4l4 4-4 4",
  plus: "M8 3v10M3 8h10",
  out: "M6 2.5H3v11h3M7 8h6.5M10.5 5l3 3-3 3",
  warning: "M8 2 14.5 13.5h-13ZM8 6.5v3M8 11.5v.1",
} as const;

export function Icon({ name, size = 14 }: { name: keyof typeof GLYPHS; size?: number }) {
  return (
    <svg
      width={size}
      height={size}
      viewBox="0 0 16 16"
      fill="none"
      stroke="currentColor"
      stroke-width="1.5"
      stroke-linecap="round"
      stroke-linejoin="round"
      aria-hidden="true"
    >
      <path d={GLYPHS[name]} />
    </svg>
  );
}
