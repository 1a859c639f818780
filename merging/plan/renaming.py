"""Names of one tensor in an adapter and in a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence


def match_names(names: Sequence[str], known: Mapping[str, object]) -> Callable[[str], str]:
    """How names in an adapter become those of a checkpoint that puts other parts in front.

    A checkpoint of a bare model lacks the prefix that the model with a head has (``transformer.``),
    or the other way around; nested models were renamed over the years. A prefix becomes another if
    all names with it then exist, and none did before; numbers of layers are never part of it.
    """
    missing = [name for name in names if name not in known]
    if not missing:
        return lambda name: name
    endings: dict[str, list[str]] = defaultdict(list)
    for name in known:
        parts = name.split(".")
        for cut in range(len(parts) - 1):
            endings[".".join(parts[cut:])].append(name)
    prefixes: dict[str, str] = {}
    for name in missing:
        if pair := _prefix_pair(name, endings):
            prefixes.setdefault(*pair)
    by_length = sorted(prefixes, key=len, reverse=True)

    def prefix_of(name: str) -> str | None:
        return next((old for old in by_length if name.startswith(old)), None)

    def move(name: str) -> str:
        old = prefix_of(name)
        return name if old is None else prefixes[old] + name[len(old) :]

    refused = {prefix_of(n) for n in names if n in known or move(n) not in known}

    def rename(name: str) -> str:
        is_moved = name not in known and move(name) in known and prefix_of(name) not in refused
        return move(name) if is_moved else name

    return rename


def _prefix_pair(name: str, endings: Mapping[str, list[str]]) -> tuple[str, str] | None:
    """The prefix of a name and that of the only known name with the same longest ending."""
    parts = name.split(".")
    for cut in range(len(parts) - 1):
        ending = ".".join(parts[cut:])
        if found := endings.get(ending):
            old, new = name[: -len(ending)], found[0][: -len(ending)]
            has_number = any(part.isdigit() for part in f"{old}{new}".split("."))
            return (old, new) if len(found) == 1 and not has_number else None
    return None
