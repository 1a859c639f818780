import { expect, test } from "vitest";

import type { Job, News } from "../src/api/types";
import { type JobList, changesList, foldIntoList } from "../src/lib/jobList";

function job(id: string, more: object = {}): Job {
  return { id, is_terminal: false, progress: { bytes_done: 0 }, ...more } as unknown as Job;
}

function progress(id: string, done: number): News {
  const data = { progress: { bytes_done: done }, estimated_finish_at: "2026-03-01T12:00:00Z" };
  return { type: "job.progress", job_id: id, data } as unknown as News;
}

const LIST: JobList = { jobs: [job("a"), job("b")], next: null, counts: { counts: {} } as never };

test("progress goes into the row of its job and leaves the others as they are", () => {
  const folded = foldIntoList(LIST, progress("b", 7));
  expect(folded.jobs[1]).toMatchObject({ progress: { bytes_done: 7 }, estimated_finish_at: "2026-03-01T12:00:00Z" });
  expect(folded.jobs[0]).toBe(LIST.jobs[0]);
});

test("progress of a job that is not listed, or has ended since, changes nothing", () => {
  expect(foldIntoList(LIST, progress("c", 7))).toBe(LIST);
  const ended = { ...LIST, jobs: [job("a", { is_terminal: true })] };
  expect(foldIntoList(ended, progress("a", 7))).toBe(ended);
});

test("everything but progress has the list read again", () => {
  expect(changesList(progress("a", 1))).toBe(false);
  expect(changesList({ ...progress("a", 1), type: "job.forgotten" })).toBe(true);
});
