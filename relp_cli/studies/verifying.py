"""`relp circuit --verify`: keep the selected nodes that exact patching confirms, and count the false positives."""

from __future__ import annotations

from relp_cli.errors import RelpError
from relp_cli.evaluation.missed import missed_effects
from relp_cli.evaluation.verify import confirmed
from relp_cli.methods.request import Progress
from relp_cli.runs.scoring import Session, prepare_again
from relp_cli.runs.spec import ScoreSpec
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.units import ANY_POSITION


def verify_circuit(
    spec: ScoreSpec,
    scores: Scores,
    circuit: Circuit,
    confirm: float | None,
    session: Session,
    progress: Progress | None,
) -> tuple[Circuit, list[str]]:
    """The confirmed part of a circuit: nodes with |exact effect| > `confirm` (default: the selection's τ) on the run's
    own pairs, and sentences on false positives and on what may have been missed (the diagnostic of AtP*, Kramár et al. 2024).

    Raises: RelpError for circuits without positions, and where no default for `confirm` exists.
    """
    if circuit.units.space == "edges":
        raise RelpError("--verify patches nodes; for edges compare with edge_patch (relp compare --nodes edges)")
    if circuit.labels == ANY_POSITION:
        raise RelpError("--verify patches nodes at their positions; select with --aggregate none")
    tau = circuit.meta["selection"]["tau"] if confirm is None else confirm
    prepared = prepare_again(spec, scores, session)
    where = spec.params.get("dictionary")
    dictionary = session.dictionaries(where, prepared.model) if where else None
    kept = confirmed(prepared.model, prepared.pairs, circuit, tau, scores.meta, dictionary, progress)
    rejected = circuit.n_nodes - kept.n_nodes
    share = rejected / circuit.n_nodes if circuit.n_nodes else 0.0
    said = [
        f"exact patching confirms {kept.n_nodes} of {circuit.n_nodes} nodes at |effect| > {tau:g}: "
        f"{rejected} false positives ({share:.0%})"
    ]
    if circuit.units.space == "nodes":
        left = missed_effects(
            prepared.model, prepared.pairs, circuit.masks, scores.meta["metric"], scores.meta["direction"]
        )
        said.append(
            f"missed: patching {left.n_subsets} random subsets of the {left.n_unverified} others excludes, at "
            f"{left.confidence:.0%} confidence, that one of them has an |effect| above {left.bound:.3g} in the company of "
            f"{left.company:.0f} others; where effects do not add up, its effect alone may be larger"
        )
    return kept, said
