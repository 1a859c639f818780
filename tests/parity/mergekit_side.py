"""What runs in mergekit's own environment: its merges of a list of recipes.

    python mergekit_side.py JOBS.json    # [{"recipe": {…}, "output": "…"}, …]

Prints one line a recipe: ``ok``, or what went wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Merge them all."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            options = MergeOptions(
                quiet=True,
                write_model_card=False,
                copy_tokenizer=False,
                lora_merge_cache=f"{job['output']}-adapters",
            )
            if "documents" in job["recipe"]:
                _run_documents(job["recipe"]["documents"], job["output"], options)
            else:
                config = MergeConfiguration.model_validate(job["recipe"])
                run_merge(config, job["output"], options)
            told = "ok"
        except Exception as error:  # noqa: BLE001 - one line a recipe, whatever happens
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        sys.stdout.write(f"{told}\n")
        sys.stdout.flush()


def _run_documents(documents: list[Any], output: str, options: Any) -> None:
    """As the command mergekit-multi does it."""
    from mergekit.graph import Executor
    from mergekit.scripts.multimerge import load_config, make_tasks

    source = "\n---\n".join(json.dumps(document) for document in documents)
    between = f"{output}-steps"
    configs, needed = load_config(source, between)
    tasks = make_tasks(configs, needed, options, between, output, False)
    Executor(tasks, math_device="cpu", storage_device="cpu").execute()


if __name__ == "__main__":
    main()
