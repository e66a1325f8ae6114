# SPDX-License-Identifier: Apache-2.0
"""``ci/quality``: arguments and printing."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from workbench.loads.checkpoints import Family
from workbench.loads.loads import LoadWorkers
from workbench.quality.quality import CONTENDERS, Quality, measure
from workbench.quality.quality_page import data_of, write_page
from workbench.quality.small_models import FAMILIES, Recipe, SmallModel, trained
from workbench.releases.environment import CLONE, cache_root

console = Console(width=120)


@click.command()
@click.option(
    "--family",
    "families",
    multiple=True,
    type=click.Choice(FAMILIES),
    default=FAMILIES,
    show_default=True,
    help="Shape of the model; may be given more than once.",
)
@click.option("--steps", default=Recipe().steps, show_default=True, help="Of training.")
@click.option("--windows", default=64, show_default=True, help="Of held-out text.")
@click.option("--length", default=Recipe().length, show_default=True, help="Tokens in a window.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: cache_root() / "quality",
    show_default="the user's cache folder",
    help="Where trained models are kept.",
)
@click.option(
    "--docs",
    type=click.Path(file_okay=False, path_type=Path),
    default=CLONE / "docs",
    show_default="docs of the clone",
    help="Folder for quality.md, quality.json and images/quality.png.",
)
def main(families: tuple[Family, ...], steps: int, windows: int, length: int, cache: Path, docs: Path) -> None:
    """Train two small models, serve them with every scheme, and write down what it costs in quality.

    Training is seeded, takes minutes, downloads nothing, and is done once: models are kept in the cache.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    models = [_trained(family, Recipe(steps=steps), cache) for family in families]
    results: dict[str, list[Quality]] = {}
    with tempfile.TemporaryDirectory() as logs, LoadWorkers(Path(logs)) as workers, Progress(console=console) as bar:
        for model in models:
            task = bar.add_task(f"{model.family}: serving", total=len(CONTENDERS))
            for quality in measure(model, workers, Path(logs), length, windows):
                results.setdefault(model.family, []).append(quality)
                bar.advance(task)
                bar.print(f"{model.family}  {quality.contender.name:<14} perplexity {quality.perplexity:.4f}")
    facts: dict[str, object] = {
        model.family: json.loads((model.folder / "training.json").read_text()) for model in models
    }
    write_page(results, data_of(results, facts, windows, length), docs)
    console.print(f"written: {docs / 'quality.md'}", soft_wrap=True)


def _trained(family: Family, recipe: Recipe, cache: Path) -> SmallModel:
    with Progress(console=console) as bar:
        task = bar.add_task(f"{family}: training", total=recipe.steps)
        return trained(
            family,
            recipe,
            cache,
            lambda step, _steps, loss: bar.update(task, completed=step, description=f"{family}: loss {loss:.2f}"),
        )


if __name__ == "__main__":
    main()
