/** Numbers, sizes and times as people read them. Always with a unit. */

const SIZES = ["B", "kB", "MB", "GB", "TB", "PB"];

/** Three digits and a unit: 1.23 MB, 12.3 MB, 123 MB. Decimal, as storage is sold and billed. */
export function bytes(count: number): string {
  return scaled(count, SIZES);
}

/** A size as one writes it: 5GB, 300kB, 1234567. */
export function wholeSize(count: number): string {
  let unit = 0;
  let value = count;
  while (value >= 1000 && value % 1000 === 0 && unit < SIZES.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return unit === 0 ? String(value) : `${value}${SIZES[unit]}`;
}

export function rate(bytesPerSecond: number): string {
  return `${bytes(bytesPerSecond)}/s`;
}

export function flops(count: number): string {
  return scaled(count, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]);
}

function scaled(count: number, units: readonly string[]): string {
  let value = count;
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(value) : digits(value)} ${units[unit] ?? ""}`;
}

/** Three significant digits, without an exponent while that is readable. */
export function digits(value: number): string {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  if (size >= 99.95) return value.toFixed(0);
  return value.toFixed(size >= 9.995 ? 1 : size >= 0.9995 ? 2 : 3);
}

export function count(value: number): string {
  return value.toLocaleString("en-US");
}

export function percent(share: number, places = 0): string {
  return `${(share * 100).toFixed(places)} %`;
}

/** 20 ms, 0.4 s, 12 s, 3 min 20 s, 2 h 05 min, 3 d 4 h. */
export function duration(seconds: number): string {
  if (seconds > 0 && seconds < 0.1) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 10) return `${Math.max(seconds, 0).toFixed(1)} s`;
  const total = Math.round(seconds);
  if (total < 60) return `${total} s`;
  const two = (value: number) => String(value).padStart(2, "0");
  const minutes = Math.floor(total / 60);
  if (minutes < 60) return `${minutes} min ${two(total % 60)} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${two(minutes % 60)} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** How long ago, coarse: for columns that are read at a glance. */
export function age(milliseconds: number): string {
  const seconds = Math.max(0, milliseconds / 1000);
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 172_800) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

export function clock(time: string | number | Date): string {
  return new Date(time).toLocaleTimeString("en-GB");
}

export function dateTime(time: string): string {
  const date = new Date(time);
  const two = (value: number) => String(value).padStart(2, "0");
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${clock(date)}`;
}

/** The end of an address says which model it is. */
export function shortUri(uri: string): string {
  const parts = uri.replace(/\/+$/, "").split("/");
  return parts[parts.length - 1] || uri;
}

export function shortDigest(digest: string): string {
  return digest.replace(/^sha256:/, "").slice(0, 12);
}

export function seconds(from: string | null, to: string | null, now: number): number | null {
  if (from === null) return null;
  return ((to === null ? now : Date.parse(to)) - Date.parse(from)) / 1000;
}

export function plural(number: number, noun: string, several = `${noun}s`): string {
  return `${count(number)} ${number === 1 ? noun : several}`;
}
