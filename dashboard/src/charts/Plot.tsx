/** A line chart over time or over a number, by uPlot; in the colours of the page. */

import "uplot/dist/uPlot.min.css";

import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";

import { color } from "../lib/theme";

export interface Line {
  label: string;
  values: (number | null)[];
  /** Name of a colour of the style sheet. */
  ink: string;
  dash?: number[];
  fill?: boolean;
  points?: boolean;
}

interface PlotProps {
  label: string;
  x: number[];
  lines: Line[];
  format: (value: number) => string;
  /** Of x: seconds since the epoch, or a plain number with a name. */
  xIs: "time" | string;
  isLogarithmic?: boolean;
  height?: number;
}

export function Plot({ label, x, lines, format, xIs, isLogarithmic = false, height = 180 }: PlotProps) {
  const place = useRef<HTMLDivElement>(null);
  const chart = useRef<uPlot | null>(null);
  const shape = JSON.stringify([xIs, isLogarithmic, height, lines.map((line) => [line.label, line.ink])]);

  useEffect(() => {
    const element = place.current;
    if (!element) return undefined;
    const build = () => {
      chart.current?.destroy();
      const size = { width: element.clientWidth, height };
      chart.current = new uPlot(options(size, lines, format, xIs, isLogarithmic), data(x, lines), element);
    };
    build();
    const observer = new ResizeObserver(() => {
      chart.current?.setSize({ width: element.clientWidth, height });
    });
    observer.observe(element);
    addEventListener("themechange", build);
    return () => {
      observer.disconnect();
      removeEventListener("themechange", build);
      chart.current?.destroy();
      chart.current = null;
    };
  }, [shape]);

  useEffect(() => chart.current?.setData(data(x, lines)), [x, lines]);

  return <div ref={place} class="chart" role="img" aria-label={label} />;
}

function data(x: number[], lines: Line[]): uPlot.AlignedData {
  return [x, ...lines.map((line) => line.values)] as uPlot.AlignedData;
}

function options(
  size: { width: number; height: number },
  lines: Line[],
  format: (value: number) => string,
  xIs: string,
  isLogarithmic: boolean,
): uPlot.Options {
  const axis = {
    stroke: color("muted"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: color("line"), width: 1 },
    ticks: { show: false },
  };
  const isLayered = xIs === "layer";
  return {
    ...size,
    cursor: { points: { size: 6 }, drag: { x: false, y: false } },
    scales: {
      x: { time: xIs === "time" },
      y: isLogarithmic ? { distr: 3 } : { range: (_, low, high) => [Math.min(0, low), high > 0 ? high * 1.08 : 1] },
    },
    axes: [
      {
        ...axis,
        size: 26,
        ...(isLayered ? { incrs: LAYER_STEPS } : {}),
        ...(xIs === "time" ? { incrs: TIME_STEPS, values: (_, splits) => splits.map(clockLabel) } : {}),
      },
      { ...axis, size: 74, values: (_, splits) => splits.map((value) => (value === null ? "" : tick(format(value)))) },
    ],
    series: [
      { label: xIs === "time" ? "time" : xIs, value: (_, value) => (value === null ? "" : xIs === "time" ? clockLabel(value) : String(value)) },
      ...lines.map((line) => ({
        label: line.label,
        stroke: color(line.ink),
        width: 1.5,
        ...(line.dash ? { dash: line.dash } : {}),
        ...(line.fill ? { fill: `${color(line.ink)}22` } : {}),
        points: { show: line.points ?? false, size: 5, fill: color(line.ink) },
        value: (_: uPlot, value: number | null) => (value === null ? "" : format(value)),
      })),
    ],
  };
}

const LAYER_STEPS = [1, 2, 5, 10, 20, 50, 100];
/** Seconds: labels are to the second, and none may stand there twice. */
const TIME_STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400, 604_800];

/** Ticks are round: 5.00 MB/s is 5 MB/s, and 1.00e-4 is 1e-4. */
function tick(text: string): string {
  return text.replace(/(\.\d*?)0+(?!\d)/, "$1").replace(/\.(?!\d)/, "");
}

function clockLabel(value: number): string {
  return new Date(value * 1000).toLocaleTimeString("en-GB");
}
