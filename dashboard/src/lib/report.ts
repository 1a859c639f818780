/** Sums over a merge report, by layer. */

import type { ReportTensor } from "../api/types";

export interface LayerFigures {
  layers: number[];
  lossBefore: (number | null)[];
  lossAfter: (number | null)[];
  /** Share of the interference that is left, after the sums above. */
  left: (number | null)[];
  /** For each expert, the norm of its task vectors in each layer. */
  expertNorms: (number | null)[][];
}

export function byLayer(tensors: readonly ReportTensor[]): LayerFigures {
  const groups = new Map<number, ReportTensor[]>();
  for (const tensor of tensors) {
    if (tensor.layer < 0 || !tensor.expert_norms) continue;
    groups.set(tensor.layer, [...(groups.get(tensor.layer) ?? []), tensor]);
  }
  const layers = [...groups.keys()].sort((a, b) => a - b);
  const sum = (layer: number, figure: "loss_before" | "loss_after"): number | null => {
    const known = groups.get(layer)!.map((tensor) => tensor[figure]).filter((value) => value !== undefined);
    return known.length > 0 ? known.reduce((total, value) => total + value, 0) : null;
  };
  const lossBefore = layers.map((layer) => sum(layer, "loss_before"));
  const lossAfter = layers.map((layer) => sum(layer, "loss_after"));
  const experts = Math.max(0, ...tensors.map((tensor) => tensor.expert_norms?.length ?? 0));
  const expertNorms = Array.from({ length: experts }, (_, expert) =>
    layers.map((layer) =>
      Math.sqrt(groups.get(layer)!.reduce((total, tensor) => total + (tensor.expert_norms![expert] ?? 0) ** 2, 0)),
    ),
  );
  const left = layers.map((_, index) => {
    const before = lossBefore[index];
    const after = lossAfter[index];
    return before && after !== null && after !== undefined ? after / before : null;
  });
  return { layers, lossBefore, lossAfter, left, expertNorms };
}
