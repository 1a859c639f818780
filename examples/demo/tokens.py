"""From text to windows of token ids: a byte-level BPE tokenizer, trained on the demo's corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from examples.demo.corpus import Corpus

START, END = "<s>", "</s>"
_DOCUMENTS_PER_KIND = 60  # more text makes the same tokens


def train_tokenizer(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocabulary`` tokens that gives every text back byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END)


def _sample(corpus: Corpus) -> Iterator[str]:
    for text in corpus.values():
        yield from text.training[:_DOCUMENTS_PER_KIND]


def cut_windows(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], context: int
) -> torch.Tensor:
    """Documents one after the other, each behind a start token, as windows×context ids."""
    ids: list[int] = []
    for encoded in tokenizer(list(documents))["input_ids"]:
        ids.append(tokenizer.bos_token_id)
        ids.extend(encoded)
    num_windows = len(ids) // context
    return torch.tensor(ids[: num_windows * context]).view(num_windows, context)
