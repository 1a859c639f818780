/** Pages that are loaded when they are first shown, so that the first view stays small. */

import type { ComponentType } from "preact";
import { useEffect, useState } from "preact/hooks";

import { Loading } from "../ui/parts";

export function lazy<P extends object>(load: () => Promise<ComponentType<P>>): ComponentType<P> {
  let found: ComponentType<P> | null = null;
  return function Lazy(props: P) {
    const [Loaded, setLoaded] = useState<ComponentType<P> | null>(() => found);
    const [isMissing, setIsMissing] = useState(false);
    useEffect(() => {
      if (Loaded) return;
      load().then(
        (component) => {
          found = component;
          setLoaded(() => component);
        },
        () => setIsMissing(true), // a new version was installed, or the network is down
      );
    }, [Loaded]);
    if (Loaded) return <Loaded {...props} />;
    if (isMissing) return <p class="empty">This page could not be read. Load it again.</p>;
    return <Loading what="the page" />;
  };
}
