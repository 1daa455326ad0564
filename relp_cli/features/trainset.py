"""`train_dictionaries`: one dictionary per site of a model, saved as a folder that `--dictionary` takes.

The shipped ones are made by: relp train-dictionary --model tiny-pythia -o relp_cli/features/dictionaries/tiny-pythia
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from relp_cli.errors import RelpError, RunFailed
from relp_cli.features.saelens import load_saelens, save_saelens
from relp_cli.features.sites import Site
from relp_cli.features.train import Text, TrainSpec, activations_at, quality, train_dictionary
from relp_cli.files import check_writable, write_atomically
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.models.training.corpus import sentences

CARD = "card.json"


def task_lines(count: int, seed: int = 0) -> list[str]:
    """Sentences of the shipped tasks' discovery splits, with some filler: the text that the embedded models learnt from."""
    return sentences(seed)[:count]


def read_lines(path: Path, count: int) -> list[str]:
    """The first lines of a UTF-8 text file. Raises RelpError for one that cannot be read."""
    try:
        return [line for line in path.read_text().splitlines() if line.strip()][:count]
    except (OSError, UnicodeDecodeError) as error:
        raise RelpError(f"text {path} cannot be read: {error}") from error


def train_dictionaries(
    model: Model,
    lines: Sequence[str],
    sites: Sequence[Site],
    spec: TrainSpec,
    folder: Path,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train and save one dictionary per site; returns what was measured, one row per site (also in card.json).

    Quality is measured on the saved file, in half precision. Raises: RelpError where the folder cannot be written to.
    """
    card = folder / CARD
    if card.is_file() and json.loads(card.read_text()).get("revision") != model.revision:
        raise RelpError(f"{folder} holds dictionaries of another model; choose another --output")
    check_writable(folder)
    text, rows, total = Text.of(model, lines), [], len(set(sites)) * spec.steps
    for number, site in enumerate(dict.fromkeys(sites)):
        x = activations_at(model, text.train, [site], text.skip)[site]

        def report(step: int, before: int = number * spec.steps) -> None:
            if progress and (step % 50 == 0 or step == spec.steps):
                progress(before + step, total, "train-dictionary")

        found = train_dictionary(x, spec, report)
        if not all(t.isfinite().all() for t in (found.w_enc, found.b_enc, found.w_dec, found.b_dec)):
            raise RunFailed(
                f"training diverged at {site.name}: weights are not finite; try a smaller --lr than {spec.lr:g}"
            )
        # What enters the first block is the embedding only where no positions are added to it.
        hook = "blocks.0.hook_resid_pre" if site.kind == "embed" and "pos_embed.hook_out" in model.points else site.hook
        save_saelens(folder / site.name, found, hook, model.name, {"revision": model.revision, "seed": spec.seed})
        measured = quality(model, site, load_saelens(folder / site.name)[0], text)
        rows.append({"site": site.name, "features": spec.features, **measured.as_dict(), "tokens": len(x)})
    content = {
        "model": model.name,
        "revision": model.revision,
        "spec": spec.model_dump(),
        "lines": len(lines),
        "sites": rows,
    }
    write_atomically(card, json.dumps(content, indent=1) + "\n")
    return pd.DataFrame(rows)
