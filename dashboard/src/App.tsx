/** The frame: who is logged in, where one can go, and the page of the present address. */

import type { ComponentType } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";

import { ApiError, get, watchSession } from "./api/client";
import type { Problem } from "./api/types";
import { lazy } from "./lib/lazy";
import { Link, Router, href, usePlace } from "./lib/router";
import { type Session, SessionContext, logOut } from "./lib/session";
import { chooseTheme, currentTheme } from "./lib/theme";
import { JobsPage } from "./pages/Jobs";
import { LoginPage } from "./pages/Login";
import { Icon } from "./ui/icons";
import { ProblemNotice } from "./ui/parts";

const JobPage = lazy(() => import("./pages/Job").then((module) => module.JobPage));
const NewMergePage = lazy(() => import("./pages/NewMerge").then((module) => module.NewMergePage));
const ComparePage = lazy(() => import("./pages/Compare").then((module) => module.ComparePage));
const WorkersPage = lazy(() => import("./pages/Workers").then((module) => module.WorkersPage));
const SettingsPage = lazy(() => import("./pages/Settings").then((module) => module.SettingsPage));

const NAVIGATION = [
  ["jobs", "Jobs"],
  ["new", "New merge"],
  ["compare", "Compare"],
  ["workers", "Workers"],
  ["settings", "Settings"],
] as const;

export function App() {
  const [session, setSession] = useState<Session | null>(null);
  const [isAsked, setIsAsked] = useState(false);
  const [problem, setProblem] = useState<Problem | null>(null);

  useEffect(() => {
    watchSession(() => setSession(null));
    get<Session>("v1/sessions/current")
      .then(setSession)
      .catch((error: unknown) => {
        if (!(error instanceof ApiError)) throw error;
        if (error.problem.code !== "unauthenticated") setProblem(error.problem);
      })
      .finally(() => setIsAsked(true));
  }, []);

  if (!isAsked) return null;
  if (problem) {
    return (
      <main>
        <ProblemNotice problem={problem} />
      </main>
    );
  }
  if (session === null) return <LoginPage onLogin={setSession} />;
  return (
    <SessionContext.Provider value={session}>
      <Router>
        <Shell session={session} onLogout={() => setSession(null)} />
      </Router>
    </SessionContext.Provider>
  );
}

function Shell({ session, onLogout }: { session: Session; onLogout: () => void }) {
  const { segments } = usePlace();
  const current = segments[0] ?? "jobs";
  const main = useRef<HTMLElement>(null);
  const leave = async () => {
    await logOut();
    onLogout();
  };
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => {
        event.preventDefault();
        main.current?.focus();
      }}>
        Skip to content
      </a>
      <header class="top">
        <Link to={href("")} class="brand">
          <Icon name="logo" size={16} /> Mergeyard
        </Link>
        <nav aria-label="Pages">
          {NAVIGATION.map(([path, label]) => (
            <Link key={path} to={href(path)} isCurrent={current === path}>
              {label}
            </Link>
          ))}
        </nav>
        <div class="who">
          <ThemeButton />
          <button type="button" class="button quiet" onClick={leave} title="Log out">
            {session.token_name} <Icon name="out" />
            <span class="visually-hidden">, log out</span>
          </button>
        </div>
      </header>
      <main id="main" ref={main} tabIndex={-1}>
        <CurrentPage segments={segments} />
      </main>
    </>
  );
}

function CurrentPage({ segments }: { segments: string[] }) {
  const [page = "jobs", id] = segments;
  if (page === "jobs" && id) return <JobPage key={id} id={id} />;
  const Page: ComponentType | undefined = {
    jobs: JobsPage,
    new: NewMergePage,
    compare: ComparePage,
    workers: WorkersPage,
    settings: SettingsPage,
  }[page];
  if (Page && !id) return <Page />;
  return (
    <div class="empty">
      <h1>There is no such page</h1>
      <p>
        <Link to={href("jobs")}>All jobs</Link>
      </p>
    </div>
  );
}

function ThemeButton() {
  const [theme, setTheme] = useState(currentTheme());
  const next = theme === "dark" ? "light" : "dark";
  const change = () => {
    chooseTheme(next);
    setTheme(next);
  };
  return (
    <button type="button" class="button quiet" onClick={change} aria-label={`Use ${next} colours`}>
      <Icon name={next === "dark" ? "moon" : "sun"} />
    </button>
  );
}
