"""The demo's text: found on this machine, split for good, and given back by its tokenizer."""

from __future__ import annotations

from itertools import islice

import pytest

from examples.demo import corpus
from examples.demo.corpus import KindText, corpus_digest, split

DOCUMENTS = [f"{number} " + "the quick brown fox " * 40 for number in range(300)]
EVERYTHING = 10**9


@pytest.mark.parametrize("kind", [corpus.BASE_KIND, *corpus.EXPERT_KINDS])
def test_every_kind_of_text_is_on_this_machine(kind: str) -> None:
    documents = list(islice(corpus._READERS[kind](), 5))
    assert len(documents) == 5
    assert all(isinstance(document, str) for document in documents)


def test_no_document_is_on_both_sides_and_none_is_lost() -> None:
    text = split(DOCUMENTS, EVERYTHING)
    assert not set(text.training) & set(text.held_out)
    assert set(text.training) | set(text.held_out) == set(DOCUMENTS)
    share = len(text.held_out) / len(DOCUMENTS)
    assert 0.5 < share * corpus.HELD_OUT_ONE_IN < 1.5


def test_the_side_of_a_document_does_not_depend_on_the_others() -> None:
    held_out = split(DOCUMENTS, EVERYTHING).held_out
    for part in (DOCUMENTS[::2], DOCUMENTS[1::2]):
        assert set(split(part, EVERYTHING).held_out) == set(held_out) & set(part)


def test_the_order_of_reading_changes_nothing() -> None:
    assert split(DOCUMENTS[::-1], 50_000) == split(DOCUMENTS, 50_000)


def test_copies_count_once_and_short_documents_not_at_all() -> None:
    text = split([*DOCUMENTS, *DOCUMENTS, "short"], EVERYTHING)
    assert sorted(text.training + text.held_out) == sorted(DOCUMENTS)


def test_long_documents_are_clipped() -> None:
    text = split(["x" * (corpus.MAX_DOCUMENT_CHARS + 1)], EVERYTHING)
    assert [len(document) for document in text.training + text.held_out] == [
        corpus.MAX_DOCUMENT_CHARS
    ]


def test_each_side_stops_when_it_is_full() -> None:
    text = split(DOCUMENTS, 8_000)
    length = max(map(len, DOCUMENTS))
    assert 8_000 <= sum(map(len, text.training)) < 8_000 + length
    assert 1_000 <= sum(map(len, text.held_out)) < 1_000 + length


def test_the_digest_tells_text_kind_and_side_apart() -> None:
    one, other = KindText(("a",), ("b",)), KindText(("b",), ("a",))
    digests = {
        corpus_digest({"python": one}),
        corpus_digest({"python": other}),
        corpus_digest({"cpp": one}),
        corpus_digest({"python": one, "cpp": other}),
    }
    assert len(digests) == 4
    assert corpus_digest({"python": one}) == corpus_digest({"python": KindText(("a",), ("b",))})


def test_only_paragraphs_of_prose_are_taken_from_descriptions_and_all_else_is_left() -> None:
    prose = "A sentence that is long enough to be more than a label, with a link."
    description = {
        "operations": {"Get": {"documentation": f"<p>{prose[:-5]}<b>link.</b></p><p>label</p>"}},
        "shapes": [{"type": "string", "documentation": f"<p>{prose}</p>"}],
    }
    assert list(corpus._paragraphs(description)) == [prose]
    assert corpus._without_prose(description) == {
        "operations": {"Get": {}},
        "shapes": [{"type": "string"}],
    }


def test_the_tokenizer_gives_text_back_and_windows_hold_it_in_order() -> None:
    pytest.importorskip("transformers")
    from examples.demo.tokens import START, cut_windows, train_tokenizer

    documents = ("def f(x):\n\treturn x\n", "naïve — «ünïcode» 数\x00\r\n", DOCUMENTS[0])
    tokenizer = train_tokenizer({"python": KindText(documents, ())}, 300)
    assert len(tokenizer) == 300
    for document in documents:
        assert tokenizer.decode(tokenizer(document)["input_ids"]) == document

    windows = cut_windows(tokenizer, documents, 16)
    assert windows.shape[1] == 16
    text = tokenizer.decode(windows.flatten())
    assert (START + START.join(documents)).startswith(text)
    assert text.count(START) == len(documents)
