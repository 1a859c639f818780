"""Writes ``docs/reference`` from the declarations in the code: ``python -m docs.generate``.

A test fails while the files there are not what this makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from merging.method import MergeMethod, all_methods
from merging.options import MergeOptions
from merging.parameters import TouchParameters
from service.app import describe_api
from service.metrics import Metrics
from service.problems import KINDS
from service.runner.metrics import RunnerMetrics
from service.settings import ENV_PREFIX, Settings
from service.storage_metrics import StorageMetrics

FOLDER = Path(__file__).parent / "reference"
_NOTE = "<!-- Made by `python -m docs.generate`; do not edit. -->"


def main() -> None:
    """Write the files."""
    for name, text in make_reference().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def make_reference() -> dict[str, str]:
    """Contents of the files by name."""
    return {
        "methods.md": _methods(),
        "settings.md": _settings(),
        "errors.md": _errors(),
        "metrics.md": _metrics(),
        "openapi.json": json.dumps(describe_api(), indent=1, ensure_ascii=False) + "\n",
    }


def _methods() -> str:
    methods = all_methods().values()
    overview = _table(
        ("method", "what it does"),
        ((f"[{m.name}](#{m.name}){' **start here**' * m.recommended}", m.summary) for m in methods),
    )
    parts = "\n\n".join(_method(method) for method in methods)
    return (
        f"# Merge methods\n\n{_NOTE}\n\n"
        "`mergeyard methods` and `GET /v1/methods` tell the same. How values can differ by layer"
        " and by tensor is in\n[recipes](../recipes.md#values).\n\n"
        f"{overview}\n\n## Every method\n\nThese parameters of the merge are common to all methods."
        f"\n\n{_parameters(TouchParameters)}\n\n{parts}\n"
    )


def _base(method: MergeMethod) -> str:
    if method.needs_base:
        return "needed"
    return "used if there is one" if method.optional_base else "not used"


def _method(method: MergeMethod) -> str:
    most = "" if method.max_experts is None else f", at most {method.max_experts}"
    facts = {
        "Source": method.source,
        "Base model": _base(method),
        "Experts": f"at least {method.min_experts}{most}",
        "Merges by default": {
            "all": "all float tensors",
            "linear": "the 2-D weights of linear layers",
        }[method.default_touch],
        "The rest becomes": {"base": "the base model's", "mean": "the experts' mean"}[
            method.default_rest
        ],
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    tables = [
        f"{title}\n\n{_parameters(model, without=tuple(TouchParameters.model_fields))}"
        for title, model in (
            ("Parameters of the merge:", method.parameters),
            (
                "Parameters of an expert, or of all if given for the merge:",
                method.expert_parameters,
            ),
        )
        if model.model_fields.keys() - TouchParameters.model_fields
    ]
    body = "\n\n".join([method.summary, lines, *tables])
    return f"## {method.name}\n\n**{method.title}.** {body}"


def _parameters(model: type[BaseModel], *, without: Sequence[str] = ()) -> str:
    schema = model.model_json_schema()["properties"]
    rows = []
    for name, field in model.model_fields.items():
        if name not in without:
            shown = field.alias or name
            kind = _kind(schema[shown])
            rows.append((f"`{shown}`", kind, _default(field), field.description or ""))
    return _table(("name", "value", "default", "meaning"), rows)


def _settings() -> str:
    schema = Settings.model_json_schema()["properties"]
    rows = [
        (
            f"`{ENV_PREFIX}{name.upper()}`",
            _kind(schema[name]),
            _default(field),
            field.description or "",
        )
        for name, field in Settings.model_fields.items()
    ]
    return (
        f"# Settings\n\n{_NOTE}\n\n"
        "The service reads its settings from the environment, once, at start. `mergeyard serve"
        " --help` lists those that\ncan also be options; options have precedence. The command line"
        f" as a client reads `{ENV_PREFIX}URL`, `{ENV_PREFIX}TOKEN`\nand `{ENV_PREFIX}DATA_DIR`"
        " (where the first token is). Credentials and endpoints of S3 are boto3's own\n"
        "(`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, profiles, roles).\n\n"
        f"{_table(('variable', 'value', 'default', 'meaning'), rows)}\n\n"
        "## Options of a merge\n\n"
        "Given with `--max-shard-size` and so on to `mergeyard merge` and `submit`, or as `options`"
        " of a request.\n\n"
        f"{_parameters(MergeOptions)}\n"
    )


def _metrics() -> str:
    metrics = Metrics("")
    RunnerMetrics(metrics)
    StorageMetrics(metrics.registry)
    rows = [
        (
            f"`{family.name}{'_total' * (family.type == 'counter')}`",
            family.type,
            family.documentation,
        )
        for family in sorted(metrics.registry.collect(), key=lambda family: family.name)
    ]
    return (
        f"# Metrics\n\n{_NOTE}\n\n"
        "`GET /metrics` of every process of the service, in the format of Prometheus, with a token"
        " that has the scope\n`metrics:read`. Counters are of that process; what runners count is"
        " absent where jobs are not run. Ray's own metrics\ntell of its nodes and workers.\n\n"
        "`mergeyard_stale_writes_refused_total` and `mergeyard_outbox_oldest_pending_seconds` are"
        " the two to be woken for.\n\n"
        f"{_table(('metric', 'kind', 'meaning'), rows)}\n"
    )


def _errors() -> str:
    rows = [(f"`{code}`", str(status), title) for code, (status, title) in KINDS.items()]
    return (
        f"# Error codes\n\n{_NOTE}\n\n"
        "`code` of a problem object (RFC 9457), in answers of the API and in the `error` of a"
        " failed job. Codes do not\nchange; `detail` says what happened this time, and is for"
        " people. `retryable` says whether the same request may\nsucceed later, `errors` holds one"
        " entry for each thing that is wrong.\n\n"
        f"{_table(('code', 'status', 'meaning'), rows)}\n"
    )


def _kind(schema: Mapping[str, Any]) -> str:
    """What values a JSON Schema allows, for people."""
    if "anyOf" in schema:
        kinds = [_kind(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    name = {"integer": "whole number", "boolean": "true or false", "string": "text"}.get(
        schema["type"], schema["type"]
    )
    bounds = [
        f"{sign} {_number(schema[key])}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    return ", ".join([f"{name} {bounds[0]}", *bounds[1:]]) if bounds else name


def _number(value: float) -> str:
    if isinstance(value, int) and value >= 1 << 20 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        # Depends on the machine; the factory says on what.
        return (field.default_factory.__doc__ or "").strip().rstrip(".").replace("``", "`")
    value = field.default
    if value is None or value == () or str(value) == "":
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )


if __name__ == "__main__":
    main()
