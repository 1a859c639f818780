"""Writes the chart's README from Chart.yaml and the comments of values.yaml.

python deploy/helm/readme.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

CHART = Path(__file__).parent / "mergeyard"
_TEXT = """# {name}

<!-- Made by `python deploy/helm/readme.py`; do not edit. -->

{description}. Version {version}, for Kubernetes {kube_version}. How to run it is in
[docs/operations.md](../../../docs/operations.md); values for whole deployments are in [ci/](ci).

```
helm install merges deploy/helm/mergeyard --values my-values.yaml
helm test merges
```

{preface}

| value | default | meaning |
| --- | --- | --- |
{rows}
"""


def make_readme() -> str:
    """The README's text."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    rows = (
        f"| `{path}` | `{default}` | {meaning} |" for path, default, meaning in _walk(root, lines)
    )
    return _TEXT.format(
        name=chart["name"],
        description=chart["description"],
        version=chart["version"],
        kube_version=chart["kubeVersion"].removesuffix("-0"),
        preface="\n".join(_comment_above(lines, lines.index(""))),
        rows="\n".join(rows),
    )


def _walk(node: yaml.MappingNode, lines: list[str], path: str = "") -> Iterator[tuple[str, ...]]:
    """Path, default and meaning of every value that is not itself a block of values."""
    for key, value in node.value:
        name = f"{path}.{key.value}" if path else key.value
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _walk(value, lines, name)
            continue
        default = json.dumps(yaml.safe_load(yaml.serialize(value)), ensure_ascii=False)
        yield name, default, _meaning(lines, key.start_mark.line)


def _meaning(lines: list[str], line: int) -> str:
    comment = _comment_above(lines, line)
    starts = [n for n, text in enumerate(comment) if text.startswith("-- ")]
    if not starts:
        return ""
    return " ".join(comment[starts[-1] :]).removeprefix("-- ").replace("|", "&#124;")


def _comment_above(lines: list[str], line: int) -> list[str]:
    first = line
    while first and lines[first - 1].strip().startswith("#"):
        first -= 1
    return [text.strip().removeprefix("#").strip() for text in lines[first:line]]


if __name__ == "__main__":
    (CHART / "README.md").write_text(make_readme(), encoding="utf-8")
