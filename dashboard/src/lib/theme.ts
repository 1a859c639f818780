/** Light or dark: as the system says, unless somebody chose here. */

const KEY = "mergeyard-theme";

export type Theme = "light" | "dark";

const dark = matchMedia("(prefers-color-scheme: dark)");

export function currentTheme(): Theme {
  const chosen = localStorage.getItem(KEY);
  if (chosen === "light" || chosen === "dark") return chosen;
  return dark.matches ? "dark" : "light";
}

export function applyTheme(): void {
  document.documentElement.dataset.theme = currentTheme();
  dispatchEvent(new Event("themechange"));
}

export function chooseTheme(theme: Theme): void {
  localStorage.setItem(KEY, theme);
  applyTheme();
}

dark.addEventListener("change", applyTheme);

/** A colour of the style sheet, for canvases. */
export function color(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
