"""relp: circuit discovery for transformer language models.

    import relp_cli as relp
    model = relp.load_model("tiny-gpt2")
    pairs = relp.load_task("ioi").pairs(model, n=100, seed=0, split="discovery")
    scores = relp.score(model, pairs, method="relp", nodes=["resid_pre", "attn_out", "mlp_out"])

Names are imported when they are first used, so `import relp_cli` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relp_cli.edges.neurons import neuron_edges as neuron_edges
    from relp_cli.errors import RelpError as RelpError
    from relp_cli.evaluation.circuit_tests import circuit_tests as circuit_tests
    from relp_cli.evaluation.compare import compare as compare
    from relp_cli.evaluation.evaluate import evaluate as evaluate
    from relp_cli.evaluation.minimality import applied as applied
    from relp_cli.features.edges import feature_edges as feature_edges
    from relp_cli.models.load import load_model as load_model
    from relp_cli.scoring import score as score
    from relp_cli.selection import select as select
    from relp_cli.spaces.circuit import Circuit as Circuit
    from relp_cli.spaces.edges import EdgeCircuit as EdgeCircuit
    from relp_cli.spaces.refine import only_stable as only_stable
    from relp_cli.spaces.refine import rank_average as rank_average
    from relp_cli.spaces.scores import Scores as Scores
    from relp_cli.tasks.pairs import PairBatch as PairBatch
    from relp_cli.tasks.pairs import PromptPair as PromptPair
    from relp_cli.tasks.task import load_task as load_task
    from relp_cli.tasks.texts import pairs_from as pairs_from

__version__ = "0.1.0"
MOST_SEED = 2**32 - 1  # seeds from 0 to this: what every generator of random numbers takes
BATCH_SIZE = 32  # pairs per pass, unless asked otherwise

_WHERE = {
    "Circuit": "spaces.circuit",
    "EdgeCircuit": "spaces.edges",
    "PairBatch": "tasks.pairs",
    "PromptPair": "tasks.pairs",
    "RelpError": "errors",
    "applied": "evaluation.minimality",
    "Scores": "spaces.scores",
    "circuit_tests": "evaluation.circuit_tests",
    "compare": "evaluation.compare",
    "evaluate": "evaluation.evaluate",
    "feature_edges": "features.edges",
    "load_model": "models.load",
    "load_task": "tasks.task",
    "neuron_edges": "edges.neurons",
    "only_stable": "spaces.refine",
    "pairs_from": "tasks.texts",
    "rank_average": "spaces.refine",
    "score": "scoring",
    "select": "selection",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'relp_cli' has no attribute '{name}'")
    return getattr(importlib.import_module(f"relp_cli.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
