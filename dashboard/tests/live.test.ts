import { expect, test, vi } from "vitest";

import type { News } from "../src/api/types";
import { Reader } from "../src/live/reader";

function event(position: number): News {
  return { position } as News;
}

/** A reader whose reads are answered by hand. */
function reader() {
  const answers: ((value: string) => void)[] = [];
  const shown: [string, number[]][] = [];
  const made = new Reader<string>(() => undefined);
  made.read = () => new Promise((resolve) => answers.push(resolve));
  made.show = (value, since) => shown.push([value, since.map((item) => item.position)]);
  return { made, answers, shown };
}

test("what happens while something is read is told with it, and what was before is not", async () => {
  vi.useFakeTimers();
  const { made, answers, shown } = reader();
  made.note([event(1)]);
  made.ask();
  made.note([event(2), event(3)]);
  answers[0]!("first");
  await vi.advanceTimersByTimeAsync(0);
  expect(shown).toEqual([["first", [2, 3]]]);
  vi.useRealTimers();
});

test("it is read again once for all that happened meanwhile, and not at all for nothing", async () => {
  vi.useFakeTimers();
  const { made, answers } = reader();
  made.ask();
  made.ask();
  made.ask();
  expect(answers).toHaveLength(1);
  answers[0]!("first");
  await vi.advanceTimersByTimeAsync(5000);
  expect(answers).toHaveLength(2);
  answers[1]!("second");
  await vi.advanceTimersByTimeAsync(60_000);
  expect(answers).toHaveLength(2);
  vi.useRealTimers();
});

test("another thing is read at once, and the answer for the first comes too late", async () => {
  const { made, answers, shown } = reader();
  made.askAnew(); // nothing was read yet: the stream does not stand
  expect(answers).toHaveLength(0);
  made.ask();
  made.askAnew();
  expect(answers).toHaveLength(2);
  answers[1]!("second");
  answers[0]!("first");
  await vi.waitFor(() => expect(shown).toEqual([["second", []]]));
  made.stop();
});
