/** Colours of a share between 0 and 1: light to deep, told apart without red and green. */

type Rgb = readonly [number, number, number];

// Anchors near the ends of viridis, which keeps its order in grey and for the colour-blind.
const LIGHT: readonly Rgb[] = [
  [233, 236, 205],
  [144, 205, 155],
  [55, 150, 141],
  [42, 93, 136],
  [52, 36, 104],
];
const DARK: readonly Rgb[] = [
  [52, 42, 92],
  [46, 92, 136],
  [50, 142, 140],
  [110, 196, 122],
  [240, 229, 80],
];

/** What merges leave differs in its order of magnitude: 0, 90, 99 and 99.9 % lie equally apart. */
export function removedPlace(interferenceRemoved: number): number {
  const left = Math.min(Math.max(1 - interferenceRemoved, 0.001), 1);
  return -Math.log10(left) / 3;
}

export function scaleColor(share: number, isDark: boolean): string {
  const anchors = isDark ? DARK : LIGHT;
  const place = Math.min(Math.max(share, 0), 1) * (anchors.length - 1);
  const low = Math.min(Math.floor(place), anchors.length - 2);
  const from = anchors[low]!;
  const to = anchors[low + 1]!;
  const part = place - low;
  const mixed = from.map((value, index) => Math.round(value + (to[index]! - value) * part));
  return `rgb(${mixed.join(" ")})`;
}
