"""`--dry-run` of what scores: passes, time and memory of a scoring, of a comparison, of a diagnosis; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relp_cli.costs.passes import describe_cost
from relp_cli.costs.rehearsal import expected_memory
from relp_cli.costs.timing import LATER, Timing, expected_time, spoken
from relp_cli.evaluation.causes import SECANT, secants_by_cause
from relp_cli.evaluation.diagnose import CANDIDATES, KINDS, THOROUGH
from relp_cli.runs.scoring import Drawn, Session, draw, loaded_params, prepare
from relp_cli.runs.spec import ScoreSpec
from relp_cli.studies.comparing import CompareOptions, checked_cells


@dataclass(frozen=True)
class Foreseen:
    """fields: what is said of one scoring. seconds: None where that is not known."""

    fields: dict[str, Any]
    seconds: float | None


def drawn_for(spec: ScoreSpec, session: Session) -> Drawn:
    """The pairs of a scoring; the model runs on them only where that decides which they are."""
    return prepare(spec, session) if spec.only_correct else draw(spec, session)


def foresee(spec: ScoreSpec, session: Session, drawn: Drawn | None = None) -> Foreseen:
    """What one scoring would take; a little of it is run for that."""
    at = drawn or drawn_for(spec, session)
    cost = describe_cost(at.model, at.pairs, spec)
    given = loaded_params(spec, at, session)
    session.say(f"{spec.method}: timing a few pairs …")
    took = expected_time(at.model, at.pairs, spec, given, at.metric)
    if took is not None:
        cost["time"] = str(took)
    session.say(f"{spec.method}: measuring the memory of a batch …")
    cost |= expected_memory(at.model, at.pairs, spec, given, sum(cost["nodes"].values()), at.metric)
    return Foreseen(cost, None if took is None else took.seconds)


def comparison_cost(tasks: Sequence[str], options: CompareOptions, session: Session) -> dict[str, Any]:
    """What `relp compare TASK…` would score: `scorings`, one per task, model and method, and their time together."""
    cells = checked_cells(tasks, options, session)
    rows, seconds = [], list[float | None]()
    for specs in cells:
        drawn = drawn_for(specs[options.reference], session)
        for method, spec in specs.items():
            found = foresee(spec, session, drawn)
            seconds.append(found.seconds)
            about = {"task": drawn.task.name, "model": drawn.model.name, "method": method}
            rows.append(about | {k: v for k, v in found.fields.items() if k != "nodes"})
    known = [s for s in seconds if s is not None]
    without = f", and {len(seconds) - len(known)} scorings that are not told" if len(known) < len(seconds) else ""
    said = f"about {spoken(sum(known))} here in all{without}; scores that are there are not made again"
    return {"scorings": rows, "time": said}


def diagnosis_cost(spec: ScoreSpec, method: str, top: int, thorough: bool, session: Session) -> dict[str, Any]:
    """What `relp diagnose` would run: `scorings`, one per candidate, for atp the secants of each cause alone, and the nodes that
    it patches exactly.
    """
    drawn = drawn_for(spec, session)
    tried = (CANDIDATES | THOROUGH) if thorough else CANDIDATES
    specs = {
        name: spec.model_copy(update={"method": method, "params": params, "nodes": KINDS, "metric": drawn.metric})
        for name, (method, params) in tried.items()
    }
    found = {name: foresee(one, session, drawn) for name, one in specs.items()}
    at = Timing(drawn.model, drawn.pairs, spec, {}, drawn.metric)
    nodes = 2 * top * len(KINDS)
    exact = at.forward(at.few) * LATER * nodes * at.n_pairs
    scored = sum(one.seconds or 0.0 for one in found.values())
    causes = len(secants_by_cause(drawn.model)) if method == "atp" else 0
    alone = causes * (found[SECANT].seconds or 0.0)
    keep = ("forwards", "time", "memory")
    return {
        "pairs": at.n_pairs,
        "scorings": [{"method": name, **{k: one.fields.get(k) for k in keep}} for name, one in found.items()],
        "exact patching": f"at most {nodes} nodes, {nodes * at.n_pairs:,} runs of one pair",
        "secants of one cause": f"{causes} scorings, as of {SECANT}",
        "time": f"about {spoken(scored + alone + exact)} here in all: {spoken(scored)} for the scorings, {spoken(alone)} for "
        f"secants of one cause, {spoken(exact)} for exact patching; the failure modes take a few passes more",
    }
