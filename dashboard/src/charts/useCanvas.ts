/** A canvas as wide as its place, sharp on every screen, drawn at most once a frame. */

import type { RefObject } from "preact";
import { useEffect, useRef } from "preact/hooks";

export type Draw = (context: CanvasRenderingContext2D, width: number) => void;

export function useCanvas(
  height: number,
  draw: Draw,
  dependencies: unknown[],
): RefObject<HTMLCanvasElement | null> {
  const canvas = useRef<HTMLCanvasElement | null>(null);
  const latest = useRef(draw);
  latest.current = draw;
  const frame = useRef(0);

  const schedule = () => {
    cancelAnimationFrame(frame.current);
    frame.current = requestAnimationFrame(() => {
      const element = canvas.current;
      const context = element?.getContext("2d");
      if (!element || !context) return;
      const width = element.clientWidth;
      const ratio = devicePixelRatio || 1;
      const pixels = [Math.round(width * ratio), Math.round(height * ratio)] as const;
      if (element.width !== pixels[0] || element.height !== pixels[1]) {
        [element.width, element.height] = pixels;
      }
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, width, height);
      latest.current(context, width);
    });
  };

  useEffect(schedule, [height, ...dependencies]);
  useEffect(() => {
    const observer = new ResizeObserver(schedule);
    if (canvas.current) observer.observe(canvas.current);
    addEventListener("themechange", schedule);
    return () => {
      observer.disconnect();
      removeEventListener("themechange", schedule);
      cancelAnimationFrame(frame.current);
    };
  }, [height]);
  return canvas;
}
