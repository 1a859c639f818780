/** Addresses: path segments below the base, and query parameters that hold a view's state. */

import { createContext } from "preact";
import type { ComponentChildren } from "preact";
import { useContext, useEffect, useMemo, useState } from "preact/hooks";

import { BASE } from "../api/client";

export interface Place {
  segments: string[];
  query: URLSearchParams;
}

const PlaceContext = createContext<Place>({ segments: [], query: new URLSearchParams() });

export function parsePlace(pathname: string, search: string, base: string): Place {
  const rest = pathname.startsWith(base) ? pathname.slice(base.length) : pathname.slice(1);
  const segments = rest.split("/").filter(Boolean).map(decodeURIComponent);
  return { segments, query: new URLSearchParams(search) };
}

/** Address of a view; query values that are empty are left out. */
export function href(path: string, query: Record<string, string | string[] | null> = {}): string {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item) parameters.append(name, item);
    }
  }
  const text = parameters.toString();
  return BASE + path + (text ? `?${text}` : "");
}

export function navigate(target: string, options: { replace?: boolean } = {}): void {
  if (options.replace) history.replaceState(null, "", target);
  else history.pushState(null, "", target);
  dispatchEvent(new PopStateEvent("popstate"));
}

export function Router({ children }: { children: ComponentChildren }) {
  const [address, setAddress] = useState(location.pathname + location.search);
  useEffect(() => {
    const follow = () => setAddress(location.pathname + location.search);
    addEventListener("popstate", follow);
    return () => removeEventListener("popstate", follow);
  }, []);
  const place = useMemo(() => parsePlace(location.pathname, location.search, BASE), [address]);
  return <PlaceContext.Provider value={place}>{children}</PlaceContext.Provider>;
}

export function usePlace(): Place {
  return useContext(PlaceContext);
}

/** Change some query parameters of the present view, without a new entry in the history. */
export function setQuery(changes: Record<string, string | string[] | null>): void {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    query.delete(name);
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item) query.append(name, item);
    }
  }
  const text = query.toString();
  navigate(location.pathname + (text ? `?${text}` : ""), { replace: true });
}

interface LinkProps {
  to: string;
  children: ComponentChildren;
  class?: string;
  title?: string;
  isCurrent?: boolean;
}

/** A real link, followed without loading the page anew. */
export function Link({ to, children, isCurrent, ...rest }: LinkProps) {
  const follow = (event: MouseEvent) => {
    const isPlain = event.button === 0 && !event.metaKey && !event.ctrlKey && !event.shiftKey;
    if (!isPlain || event.defaultPrevented) return;
    event.preventDefault();
    const isOtherPage = new URL(to, location.href).pathname !== location.pathname;
    navigate(to);
    if (isOtherPage) scrollTo(0, 0);
  };
  return (
    <a href={to} onClick={follow} {...(isCurrent ? { "aria-current": "page" } : {})} {...rest}>
      {children}
    </a>
  );
}
