"""Mergeyard in one command: make a model and three experts, merge them, see what is kept.

python -m examples.demo [--local-files] [--models-only] [--fresh] [--cache-dir FOLDER] [--tiny]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from examples.demo.errors import DemoError

if TYPE_CHECKING:
    from examples.demo.models import ModelCache

_REPOSITORY = Path(__file__).parents[2]
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MAX_THREADS = 4  # matrices as small as these do not gain from more


def main() -> None:
    """Parse the command line and run; ends with 130 after Ctrl-C and 1 if something failed."""
    arguments = _parse_arguments()
    # Set before the libraries are loaded: they read these once. Everything is on this machine.
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait leave the cores to the others
    }
    for ending in _ENDINGS:
        signal.signal(ending, _interrupt)
    console = Console(highlight=False)
    try:
        _run(arguments, console)
    except KeyboardInterrupt:
        console.print("Interrupted.", style="red")
        sys.exit(130)
    except DemoError as error:
        console.print(f"Error: {error}", style="red", markup=False)
        sys.exit(1)


def _interrupt(number: int, frame: object) -> NoReturn:
    """End every block in order, children included, undisturbed by a second signal."""
    del number, frame
    for ending in _ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    add = parser.add_argument
    add("--local-files", action="store_true", help="plain folders in place of an S3 server")
    add("--models-only", action="store_true", help="make and judge the models, and stop")
    add("--fresh", action="store_true", help="make the models again")
    add("--tiny", action="store_true", help="models that learn little, in seconds")
    add(
        "--cache-dir",
        type=Path,
        default=_REPOSITORY / ".cache" / "demo",
        help="where the models are kept (default: .cache/demo)",
    )
    return parser.parse_args()


def _run(arguments: argparse.Namespace, console: Console) -> None:
    console.print("[bold]1 Text[/] that is on this machine anyway")
    import torch

    from examples.demo.corpus import EXPERT_KINDS, load_corpus
    from examples.demo.evaluate import measure_losses, results_table
    from examples.demo.models import ModelCache
    from examples.demo.settings import TINY, Settings

    torch.set_num_threads(min(_MAX_THREADS, os.cpu_count() or 1))
    settings = TINY if arguments.tiny else Settings()
    corpus = load_corpus(settings.max_chars_per_kind)
    for kind, text in corpus.items():
        training, held_out = (sum(map(len, side)) / 1e6 for side in (text.training, text.held_out))
        console.print(f"  {kind:<8} {training:.1f} M characters, {held_out:.1f} M held out")

    console.print("[bold]2 Models[/]: a small Llama, and three experts fine-tuned from it")
    cache = ModelCache(arguments.cache_dir, corpus, settings)
    if arguments.fresh:
        cache.clear()
    _make_missing(cache, console)
    with console.status("  measuring their losses"):
        losses = cache.losses()
    merges = {}
    if not arguments.models_only:
        with tempfile.TemporaryDirectory(prefix="mergeyard-demo-") as folder:
            merged = _merge(cache, Path(folder), console, local=arguments.local_files)
            console.print("[bold]5 Results[/]: every merged model, loaded with transformers")
            with console.status("  measuring their losses"):
                windows = cache.held_out()
                merges = {title: measure_losses(path, windows) for title, path in merged.items()}
    experts = {kind: losses[kind] for kind in EXPERT_KINDS}
    console.print(results_table(losses["base"], experts, merges))


def _make_missing(cache: ModelCache, console: Console) -> None:
    if not cache.missing:
        console.print(f"  kept from an earlier run in {cache.folder}")
        return
    columns = (
        TextColumn("  {task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        for name in cache.missing:
            bar = progress.add_task(name, total=None, note="")

            def on_step(step: int, num_steps: int, loss: float, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, total=num_steps, note=f"loss {loss:.2f}")

            cache.make(name, on_step)
    console.print(f"  kept in {cache.folder}")


def _merge(cache: ModelCache, folder: Path, console: Console, *, local: bool) -> dict[str, Path]:
    """Merge by every recipe of the demo; returns local folders by the recipe's title."""
    from examples.demo.places import local_place, s3_place
    from examples.demo.recipes import MERGES
    from examples.demo.service import run_merges, running_service

    with local_place(folder / "models") if local else s3_place() as place:
        console.print(f"[bold]3 Storage[/]: checkpoints go to {place.root}/models")
        for name in cache.names:
            place.put(cache.folder / name, f"models/{name}")
        with running_service(folder, place) as service:
            console.print(f"[bold]4 Service[/] on {service.url}: {len(MERGES)} jobs at once")
            names = run_merges(service, place, MERGES, console)
        return {title: place.get(name, folder / name) for title, name in names.items()}


if __name__ == "__main__":
    main()
