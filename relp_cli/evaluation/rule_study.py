"""Which LRP rules agree best with exact patching, per node kind, direction and depth: the tables of docs/rules.md.

    python -m relp_cli.evaluation.rule_study --pairs 40 -o runs/rule-study            # every embedded model and its tasks
    python -m relp_cli.evaluation.rule_study --models DIR --tasks pairs.jsonl -o OUT   # any other

1. A cell is one model, task, direction and node kind. In each, every candidate rule set (`auto.candidates`) scores the
   same pairs, and exact patching gives the reference.
2. The PCC of pair-averaged scores is taken over all layers, and over the first, middle and last third of them (NaN
   where fewer than 5 nodes have an effect: in a last layer only the last position does).
3. Per node kind and direction: mean PCC over cells, and the mean difference from the family's preset with a 95 %
   bootstrap interval over models × tasks (both directions of a model and task are drawn together).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relp_cli.errors import RelpError
from relp_cli.evaluation.agreement import agreement
from relp_cli.evaluation.behaviour import behaviour
from relp_cli.files import write_atomically
from relp_cli.methods.auto import candidates
from relp_cli.methods.score import COMPONENTS
from relp_cli.models.catalog import embedded_names
from relp_cli.models.load import load_model
from relp_cli.scoring import score
from relp_cli.spaces.scores import KindScores
from relp_cli.statistics import interval, resample_picks
from relp_cli.tasks.spec import list_tasks
from relp_cli.tasks.task import load_task

DIRECTIONS = ("noising", "denoising")
LEAST_NODES = 5
DEPTHS = ("all", "first third", "middle third", "last third")


def study(models: Sequence[str], tasks: Sequence[str], pairs: int, seed: int = 0, say: Any = print) -> pd.DataFrame:
    """One row per model, task, direction, node kind, depth and rule set. Tasks that a model is not above chance on are left out,
    and so are tasks whose words it does not know; `say` is told which.
    """
    rows: list[dict[str, Any]] = []
    for name in models:
        model = load_model(name)
        for task_name in tasks:
            task = load_task(task_name)
            try:
                batches = task.pairs(model, pairs, seed)
            except RelpError as error:
                say(f"{model.name}, {task.name}: left out ({error})")
                continue
            if behaviour(model, batches, task.metric).verdict not in ("above", ""):
                say(f"{model.name}, {task.name}: left out (not shown to be above chance)")
                continue
            for direction in DIRECTIONS:
                exact = score(model, batches, "act_patch", COMPONENTS, task.metric, direction, keep_examples=True)
                for rule_set, rules in candidates(model, COMPONENTS).items():
                    found = score(
                        model, batches, "relp", COMPONENTS, task.metric, direction, keep_examples=True, rules=rules
                    )
                    about = {"model": model.name, "task": task.name, "direction": direction, "rules": rule_set}
                    rows += [
                        about | {"kind": kind, "depth": depth} | _agreement(found[kind], exact[kind], depth, seed)
                        for kind in COMPONENTS
                        for depth in DEPTHS
                    ]
            say(f"{model.name}, {task.name}: done")
    if not rows:
        raise RelpError("no model has a task to study")
    return pd.DataFrame(rows)


def _agreement(estimate: KindScores, exact: KindScores, depth: str, seed: int) -> dict[str, Any]:
    n = exact.mean.shape[0]
    early, late = -(-n // 3), -(-2 * n // 3)
    ends = {"all": (0, n), "first third": (0, early), "middle third": (early, late), "last third": (late, n)}
    part = slice(*ends[depth])
    a, b = (
        replace(
            s,
            mean=s.mean[part],
            variance=s.variance[part],
            examples=None if s.examples is None else s.examples[:, part],
        )
        for s in (estimate, exact)
    )
    if int((b.mean.abs() > 1e-6 * exact.mean.abs().max()).sum()) < LEAST_NODES:
        return {"pcc": float("nan"), "lo": float("nan"), "hi": float("nan"), "n_pairs": int(exact.n.max())}
    found = agreement(a, b, bootstrap=200 if depth == "all" else 0, seed=seed)
    return {"pcc": found.pcc, "lo": found.pcc_lo, "hi": found.pcc_hi, "n_pairs": found.n_pairs}


def summarise(rows: pd.DataFrame, depth: str = "all", draws: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Per node kind, direction (and both) and rule set: mean PCC, difference from the preset with interval, cells won."""
    out = []
    here = rows[rows.depth == depth]
    for direction in (*DIRECTIONS, "both"):
        part = here if direction == "both" else here[here.direction == direction]
        for kind in COMPONENTS:
            cells = part[part.kind == kind].pivot_table(
                index=["model", "task", "direction"], columns="rules", values="pcc"
            )
            common = cells.dropna(axis=1, how="all")
            if "preset" not in common:
                continue
            groups = [g for _, g in common.groupby(level=["model", "task"])]
            picks = resample_picks(len(groups), draws, seed)
            for rule_set in common:
                gaps = [(g[rule_set] - g["preset"]).dropna().to_numpy() for g in groups]
                sums, counts = np.array([g.sum() for g in gaps]), np.array([len(g) for g in gaps])
                mean = sums[picks].sum(1) / np.maximum(counts[picks].sum(1), 1)
                low, high = interval(mean)
                both = common[common[rule_set].notna()]
                out.append(
                    {"kind": kind, "direction": direction, "rules": rule_set, "cells": len(both),
                     "mean_pcc": both[rule_set].mean(), "preset_there": both["preset"].mean(),
                     "difference": sums.sum() / max(counts.sum(), 1), "lo": low, "hi": high,
                     "better_in": int((both[rule_set] > both["preset"]).sum())}
                )  # fmt: skip
    return pd.DataFrame(out)


def markdown(table: pd.DataFrame) -> str:
    """The summary as Markdown: one row per node kind and direction, one column per rule set."""
    names = list(dict.fromkeys(table.rules))
    lines = ["| nodes | direction | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for (kind, direction), part in table.groupby(["kind", "direction"], sort=False):
        cells = {r.rules: r for r in part.itertuples()}
        texts = []
        for name in names:
            r = cells.get(name)
            plain = r is not None and name == "preset"
            texts.append(
                "—" if r is None else f"{r.mean_pcc:.3f}" if plain else
                f"{r.mean_pcc:.3f} ({r.difference:+.3f} [{r.lo:+.3f}, {r.hi:+.3f}]; {r.better_in}/{r.cells})"
            )  # fmt: skip
        lines.append(f"| {kind} | {direction} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(embedded_names()), help="names or folders, comma-separated")
    parser.add_argument("--tasks", default=",".join(list_tasks()), help="names or files, comma-separated")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/rule-study"))
    options = parser.parse_args(arguments)
    rows = study(options.models.split(","), options.tasks.split(","), options.pairs, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "cells.csv", rows.to_csv(index=False))
    for depth in DEPTHS:
        table = summarise(rows, depth, seed=options.seed)
        write_atomically(options.output / f"summary-{depth.replace(' ', '-')}.csv", table.to_csv(index=False))
        print(f"\n{depth} layers: mean PCC with exact patching (difference from the preset [95 %]; cells better)\n")
        print(markdown(table))


if __name__ == "__main__":
    main()
