from __future__ import annotations

from typing import Any

import pytest

from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.checkpoint.vocabulary import AddedToken, Tokenizer
from merging.plan.vocabulary import RowTable, Run, Vocabulary, unite, vocabulary_tensors
from merging.recipe.tokenizer import TokenChoice


def index(config: dict[str, Any], **shapes: tuple[int, ...]) -> CheckpointIndex:
    """A checkpoint of tensors with these names (``__`` is a dot) and shapes."""
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    entries = {name: TensorEntry(name, "F32", shape, 0, 0, 0) for name, shape in names.items()}
    return CheckpointIndex("mem://m", config, (), entries)


def tokenizer(*words: str, **special: int) -> Tokenizer:
    added = tuple(AddedToken(number, word, special=True) for word, number in special.items())
    vocabulary = {word: number for number, word in enumerate(words)}
    return Tokenizer(vocabulary | special, added)


def test_only_tensors_with_a_row_for_each_token_count() -> None:
    bert = index(
        {"model_type": "bert", "vocab_size": 30},
        bert__embeddings__word_embeddings__weight=(30, 8),
        bert__embeddings__token_type_embeddings__weight=(2, 8),
        bert__embeddings__position_embeddings__weight=(64, 8),
        bert__encoder__layer__0__output__dense__weight=(30, 8),
        cls__predictions__decoder__weight=(30, 8),
        cls__predictions__bias=(30,),
        cls__predictions__transform__dense__weight=(8, 8),
    )
    assert vocabulary_tensors(bert) == dict.fromkeys(
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight",
         "cls.predictions.bias"], 30
    )  # fmt: skip


def test_the_text_model_of_one_that_sees_says_how_many_tokens_there_are() -> None:
    model = index(
        {"text_config": {"vocab_size": 40}},
        language_model__model__embed_tokens__weight=(40, 8),
        language_model__lm_head__weight=(40, 8),
        vision_tower__patch_embed__proj__weight=(64, 3, 4, 4),
        vision_tower__pos_embed=(64, 8),
    )
    assert set(vocabulary_tensors(model)) == {
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    }


def test_heads_of_other_kinds_are_left_alone() -> None:
    model = index({"vocab_size": 20}, model__embed_tokens__weight=(20, 8), score__weight=(3, 8))
    assert vocabulary_tensors(model) == {"model.embed_tokens.weight": 20}


def test_union_adds_words_first_then_special_tokens_with_their_attributes() -> None:
    base = tokenizer("a", "b", end=2)
    first = Tokenizer(
        {"c": 0, "a": 1, "tool": 2, "end": 3},
        (AddedToken(2, "tool", lstrip=True, special=True), AddedToken(3, "end", rstrip=True)),
    )
    second = tokenizer("d", "c", tool=2, eot=3)
    assert unite(base, [(base, 3), (first, 4), (second, 4)]) == (
        AddedToken(3, "c"),
        AddedToken(4, "d"),
        AddedToken(5, "tool", lstrip=True, special=True),
        AddedToken(6, "eot", special=True),
    )


def test_words_of_the_base_become_special_where_another_model_says_so() -> None:
    found = unite(tokenizer("a", "tool"), [(tokenizer("a", tool=1), 2)])
    assert found == (AddedToken(1, "tool", special=True),)


def test_tokens_without_a_row_of_their_own_model_are_no_part_of_the_union() -> None:
    assert unite(tokenizer("a"), [(tokenizer("a", "b", "c", pad=3), 2)]) == (AddedToken(1, "b"),)


TABLE = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 5}


def table(base: str | None = None, **choices: TokenChoice) -> RowTable:
    """Of x (a, b, c), y (b, a, d) and z (c, d), in three rows each; the number 4 is no token."""
    models = {
        "x": {"a": 0, "b": 1, "c": 2},
        "y": {"b": 0, "a": 1, "d": 2},
        "z": {"c": 0, "d": 2},
    }
    uris = list(models)
    return RowTable(Vocabulary(TABLE, 6, models, {}, choices), uris, uris, base, [3, 3, 3])


@pytest.mark.parametrize(
    ("base", "place", "runs"),
    [
        (None, 0, [Run(3, ((0, 0),)), Run(1, ((1, 2), (2, 2))), Run(2, ())]),
        (None, 1, [Run(1, ((1, 1),)), Run(1, ((1, 0),)), Run(1, ((0, 2), (2, 0))),
                   Run(1, ((1, 2),)), Run(2, ())]),
        ("x", 2, [Run(2, ((0, 0),)), Run(1, ((2, 0),)), Run(1, ((2, 2),)), Run(2, ())]),
    ],
)  # fmt: skip
def test_rows_follow_the_rules(base: str | None, place: int, runs: list[Run]) -> None:
    found = table(base)
    assert found.runs(place) == runs
    assert found.missing() == ["e"]


def test_choices_go_before_the_rules() -> None:
    found = table(d=TokenChoice("y"), a=TokenChoice("z", token_id=1, force=True), e=TokenChoice())
    assert found.runs(0) == [Run(1, ((2, 1),)), Run(2, ((0, 1),)), Run(1, ((1, 2),)), Run(2, ())]
    assert found.missing() == []
