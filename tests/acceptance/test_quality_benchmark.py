"""The benchmark of quality measures what it says, and the documents show what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.quality.__main__ import RECORD
from benchmarks.quality.experts import Experts, Training
from benchmarks.quality.measure import Bench
from benchmarks.quality.recipes import TUNED
from benchmarks.quality.table import documents, written_table
from benchmarks.quality.tasks import Sizes, Task, make_task
from benchmarks.quality.texts import Sample, cloud_services, scripts
from benchmarks.quality.wheels import Wheels
from merging.method import all_methods

SIZES = Sizes(training=96, validation=24, test=24)
TRAINING = Training(steps=12, batch=8, rate=1e-3)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    """Real texts that need no wheel."""
    wheels = Wheels(tmp_path_factory.mktemp("no wheels"))
    return [
        make_task("script", scripts(wheels), SIZES),
        make_task("service", cloud_services(wheels), SIZES),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tasks: list[Task]) -> Path:
    """Where the benchmark finds its encoder: a tiny one with random weights stands in."""
    folder = tmp_path_factory.mktemp("quality")
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(s.text for t in tasks for s in t.training)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token="[PAD]", model_max_length=64
    ).save_pretrained(folder / "base")
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def experts(cache: Path) -> Experts:
    return Experts(cache, Wheels(cache / "wheels"), TRAINING)


@pytest.fixture(scope="module")
def bench(cache: Path, tasks: list[Task], experts: Experts) -> Bench:
    return Bench(tasks, experts, cache, cache / "scratch")


def test_parts_of_a_task_share_no_text_and_no_group() -> None:
    samples = [
        Sample(f"text {chr(97 + i % 26)}{chr(97 + i // 26)} {i}", "ab"[i % 2], group=str(i // 3))
        for i in range(600)
    ]
    samples += [Sample(s.text.upper() + "!", s.label) for s in samples]  # the same to a reader
    task = make_task("letters", samples, Sizes(training=300, validation=40, test=60))
    parts = [task.training, task.validation, task.test]
    assert [len(part) for part in parts] == [300, pytest.approx(40, abs=20), 60]
    for part in parts:
        for other in parts:
            if part is not other:
                assert not {s.group for s in part} & {s.group for s in other}
                assert not {s.text.lower() for s in part} & {s.text.lower() for s in other}


def test_texts_with_several_labels_are_left_out() -> None:
    samples = [Sample("same words", "a"), Sample("Same words!", "b"), Sample("others", "a")]
    task = make_task("few", samples, Sizes())
    assert {s.text for s in task.training + task.validation + task.test} <= {"others"}


def test_a_merge_of_one_expert_is_as_good_as_the_expert(
    cache: Path, tasks: list[Task], experts: Experts
) -> None:
    alone = Bench(tasks[:1], experts, cache, cache / "alone")
    row = alone.measure(all_methods()["linear"])
    assert row["kept"] == pytest.approx(100)
    assert row["accuracies"] == alone.experts


def test_experts_are_trained_once(cache: Path, tasks: list[Task], experts: Experts) -> None:
    before = [(experts.folder(task) / "model.safetensors").stat().st_mtime_ns for task in tasks]
    again = Experts(cache, Wheels(cache / "wheels"), TRAINING)
    after = [(again.folder(task) / "model.safetensors").stat().st_mtime_ns for task in tasks]
    assert before == after
    other = Experts(cache, Wheels(cache / "wheels"), Training(steps=1, batch=8))
    assert other.folder(tasks[0]) != experts.folder(tasks[0])


def test_a_row_has_accuracies_costs_and_the_value_that_validation_chose(bench: Bench) -> None:
    row = bench.measure(all_methods()["task_arithmetic"])
    assert set(row["accuracies"]) == {"script", "service"}
    assert row["kept"] == pytest.approx(bench.kept(row["accuracies"]))
    assert row["cpu_seconds"] > 0
    assert row["bytes_read"] > 0
    assert row["samples"] == 0
    tried = row["tuned"]["validation"]
    assert set(tried) == set(TUNED["task_arithmetic"].values)
    assert tried[row["tuned"]["parameters"]["lambda"]] == max(tried.values())


def test_methods_that_look_at_samples_get_some(bench: Bench) -> None:
    row = bench.measure(all_methods()["regmean"])
    assert row["samples"] == 128
    assert row["kept"] >= 0


def test_methods_that_cannot_merge_these_experts_say_why(bench: Bench) -> None:
    assert "at most 1 models" in bench.measure(all_methods()["slerp"])["excluded"]


def test_documents_show_the_measured_figures() -> None:
    figures = json.loads(RECORD.read_text(encoding="utf-8"))["figures"]
    for document, text in documents(figures).items():
        assert written_table(document) == text, "run: python -m benchmarks quality --document"


def test_tuned_parameters_are_ones_that_the_methods_have() -> None:
    for name, tuned in TUNED.items():
        method = all_methods()[name]
        known = {
            field.alias or key
            for model in (method.parameters, method.expert_parameters)
            for key, field in model.model_fields.items()
        }
        assert {tuned.key, *tuned.settings} <= known, name
