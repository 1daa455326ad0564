"""`train_dictionaries`: one dictionary per site of a model, saved as a folder that `--dictionary` takes.

A site's folder appears whole, by one rename, and says by a hash what it was trained with; so a run that was cut short goes on
with the next site, and a finished one is not done again. The shipped ones are made, in a folder that is not there yet, by:
relp train-dictionary --model tiny-pythia -o relp_cli/features/dictionaries/tiny-pythia
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError, RunFailed
from relp_cli.features.dictionary import Dictionary
from relp_cli.features.folder import Settings, read_object
from relp_cli.features.saelens import CONFIG, load_saelens, save_saelens
from relp_cli.features.train import Text, TrainSpec, activations_at, enough, quality, train_dictionary
from relp_cli.files import check_writable, lines_of, write_atomically
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.models.training.corpus import sentences
from relp_cli.spaces.sites import Site

CARD = "card.json"


class _Row(Settings):
    site: str


class _Card(Settings):
    revision: str
    spec: dict[str, Any]
    settings: str = ""
    sites: list[_Row]


class _Made(Settings):
    settings: str = ""


class _Folder(Settings):
    metadata: _Made = _Made()


def task_lines(count: int, seed: int = 0) -> list[str]:
    """Sentences of the shipped tasks' discovery splits, with some filler: the text that the embedded models learnt from."""
    return list(sentences(seed)[:count])


def read_lines(path: Path, count: int) -> list[str]:
    """The first lines of a UTF-8 text file that are not blank. Raises RelpError for one that cannot be read, or has too few."""
    lines = lines_of(path, "text")[:count]
    enough(len(lines), f" in {path}")
    return lines


def train_dictionaries(
    model: Model,
    lines: Sequence[str],
    sites: Sequence[Site],
    spec: TrainSpec,
    folder: Path,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train and save one dictionary per site; returns what was measured, one row per site (also in card.json).

    Sites that the folder has already, trained on the same model and text with the same settings, are left as they are.
    Raises: RelpError where the folder cannot be written to, or holds anything else than such sites.
    """
    sites = tuple(dict.fromkeys(sites))
    made = _settings(model, lines, spec)
    rows = _rows(folder, model, spec, made)
    waiting = [site for site in sites if not _done(folder / site.name, made)]
    if waiting:
        check_writable(folder)
    text = Text.of(model, lines)
    for number, site in enumerate(waiting):

        def report(step: int, before: int = number * spec.steps) -> None:
            if progress and (step % 50 == 0 or step == spec.steps):
                progress(before + step, len(waiting) * spec.steps, "train-dictionary")

        x = activations_at(model, text.train, [site], text.skip)[site]
        found = train_dictionary(x, spec, report)
        if not all(t.isfinite().all() for t in (found.w_enc, found.b_enc, found.w_dec, found.b_dec)):
            raise RunFailed(
                f"training diverged at {site.name}: weights are not finite; try a smaller --lr than {spec.lr:g}"
            )
        _save(folder, site, found, model, {"seed": spec.seed, "settings": made})
    for site in sites:
        if site.name not in rows:
            measured = quality(model, site, load_saelens(folder / site.name)[0], text).as_dict()
            rows[site.name] = {"site": site.name, "features": spec.features, **measured, "tokens": text.n_train}
            _write_card(folder, model, spec, made, len(lines), rows)
    return pd.DataFrame([rows[site.name] for site in sites])


def training_cost(model: Model, lines: Sequence[str], sites: Sequence[Site], spec: TrainSpec) -> dict[str, Any]:
    """What training would take, from the activations of one batch of text and a few steps at the first site."""
    text, few = Text.of(model, lines), min(spec.steps, 10)
    start = time.perf_counter()
    x = activations_at(model, text.train[:1], sites[:1], text.skip)[sites[0]]
    read = (time.perf_counter() - start) * text.n_train / max(1, len(x))
    start = time.perf_counter()
    train_dictionary(x, spec.model_copy(update={"steps": few}))
    step = (time.perf_counter() - start) / few
    seconds = len(sites) * (read + step * spec.steps)
    return {
        "sites": len(sites), "positions to train on": text.n_train, "steps": f"{spec.steps} at each site",
        "forward passes": f"one over the text per site, and held-out lines for what is measured ({len(lines)} lines)",
        "time": f"about {seconds:.0f} s here ({few} steps and one batch of text were timed)",
        "memory": f"{text.n_train * x.shape[1] * 4 / 2**20:.0f} MiB for the activations of a site, beside the model",
    }  # fmt: skip


def _settings(model: Model, lines: Sequence[str], spec: TrainSpec) -> str:
    """A hash of what a site's dictionary follows from."""
    everything = [model.revision, model.bos, str(model.dtype), spec.model_dump(), list(lines)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


def read_card(folder: Path) -> dict[str, Any] | None:
    """What a folder of dictionaries says of itself; None where it says nothing. Raises RelpError for a card of another form."""
    return read_object(folder / CARD, _Card) if (folder / CARD).is_file() else None


def _rows(folder: Path, model: Model, spec: TrainSpec, made: str) -> dict[str, dict[str, Any]]:
    """Site → what the folder's card says of it. Raises RelpError for a card of another model, or of other settings."""
    card = read_card(folder)
    if card is None:
        return {}
    if card["revision"] != model.revision:
        raise RelpError(f"{folder} holds dictionaries of another model; choose another --output")
    mine = spec.model_dump()
    for name, theirs in card["spec"].items():
        if mine.get(name) != theirs:
            raise RelpError(
                f"{folder} holds dictionaries with {name} {theirs}, not {mine.get(name)}; choose another --output"
            )
    if card.get("settings") != made:
        raise RelpError(
            f"{folder} holds dictionaries trained on another text or in another dtype; choose another --output"
        )
    return {row["site"]: row for row in card["sites"] if _done(folder / row["site"], made)}


def _done(folder: Path, made: str) -> bool:
    """Whether a site's folder is there. Raises RelpError where it is not of these settings."""
    if not folder.exists():
        return False
    config = read_object(folder / CONFIG, _Folder) if (folder / CONFIG).is_file() else {}
    if (config.get("metadata") or {}).get("settings") != made:
        raise RelpError(f"{folder} is there already, and was not trained with these settings; choose another --output")
    return True


def _save(folder: Path, site: Site, found: Dictionary, model: Model, about: dict[str, Any]) -> None:
    """The whole folder by one rename: one that was cut short is hidden, and no dictionary to anyone."""
    hidden = folder / f".{site.name}.partial"
    shutil.rmtree(hidden, ignore_errors=True)
    # What enters the first block is the embedding only where no positions are added to it.
    hook = "blocks.0.hook_resid_pre" if site.kind == "embed" and "pos_embed.hook_out" in model.points else site.hook
    save_saelens(hidden, found, hook, model.name, {"revision": model.revision, **about})
    try:
        hidden.rename(folder / site.name)
    except OSError as error:
        raise RunFailed(f"writing {folder / site.name} failed: {error.strerror or error}") from error


def _write_card(
    folder: Path, model: Model, spec: TrainSpec, made: str, n_lines: int, rows: dict[str, dict[str, Any]]
) -> None:
    content = {
        "model": model.name,
        "revision": model.revision,
        "spec": spec.model_dump(),
        "lines": n_lines,
        "settings": made,
        "sites": list(rows.values()),
    }
    write_atomically(folder / CARD, json.dumps(content, indent=1) + "\n")
