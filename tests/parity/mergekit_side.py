"""What runs in mergekit's own environment: its merges of a list of recipes.

    python mergekit_side.py JOBS.json    # [{"recipe": {…}, "output": "…"}, …]

Prints one line a recipe: ``ok``, or what went wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Merge them all."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run_merge(
                MergeConfiguration.model_validate(job["recipe"]),
                job["output"],
                MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False),
            )
            told = "ok"
        except Exception as error:  # noqa: BLE001 - one line a recipe, whatever happens
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        sys.stdout.write(f"{told}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
