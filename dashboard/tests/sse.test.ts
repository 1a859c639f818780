import { expect, test } from "vitest";

import { EventStreamParser } from "../src/live/sse";

const STREAM = 'retry: 1700\n\n: hello\n\nid: 1\nevent: a\ndata: {"x":1}\n\nid: 2\r\ndata: a\r\ndata: b\r\n\r\n: still here\nid: 7\n\n';

test("a stream cut at any byte gives the same messages", () => {
  const expected = [
    { id: "1", data: '{"x":1}' },
    { id: "2", data: "a\nb" },
    { id: "7", data: null },
  ];
  for (let cut = 0; cut <= STREAM.length; cut += 1) {
    const parser = new EventStreamParser();
    const found = [...parser.push(STREAM.slice(0, cut)), ...parser.push(STREAM.slice(cut))];
    expect(found).toEqual(expected);
    expect(parser.retryMilliseconds).toBe(1700);
  }
});

test("a message that is not complete yet is not given", () => {
  expect(new EventStreamParser().push("data: half\n")).toEqual([]);
});
