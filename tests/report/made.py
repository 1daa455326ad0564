"""Made-up scores and tables for the report tests."""

from __future__ import annotations

import pandas as pd
import torch

from relp_cli.spaces.scores import KindScores, Scores, whole_of

LABELS = ("bos", "S1", "IO", "S2", "end")


def node_scores(kind: str, *shape: int, seed: int = 0, n: int = 4, signed: bool = True) -> KindScores:
    mean = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    mean = mean if signed else mean.abs()
    labels = LABELS[: shape[1]]
    meta = {"signed": signed, "metric": "logit_diff"}
    return KindScores(kind, mean, torch.full(shape, 0.25), torch.full((shape[1],), n), labels, "role", meta=meta)


def scores(method: str, *kinds: KindScores) -> Scores:
    meta = {
        "method": method, "task": "ioi", "model": "tiny", "direction": "noising", "metric": "logit_diff", "n_pairs": 4,
        "rules": {"ln": 9}, "params": {"rules": ["ln"]}, "forwards_per_pair": 2.0, "backwards_per_pair": 1.0,
    }  # fmt: skip
    meta |= kinds[0].meta
    return whole_of({k.kind: k for k in kinds}, meta)


def evaluation(
    task: str = "a", method: str = "relp", points: dict[int, float] | None = None, **more: object
) -> pd.DataFrame:
    """Rows in `evaluate`'s form: {n_nodes: faithfulness}, completeness = 1 − faithfulness."""
    points = points or {1: 0.0, 10: 0.5, 100: 1.0}
    return pd.DataFrame(
        {
            "model": "tiny", "task": task, "method": method, "kind": "mlp_neuron", "n_nodes": n, "n_possible": 200,
            "faithfulness": f, "faithfulness_lo": f - 0.1, "faithfulness_hi": f + 0.1, "completeness": 1 - f,
            "completeness_lo": 0.9 - f, "completeness_hi": 1.1 - f, "n_pairs": 7, "ablation": "mean",
            "exclude_layers": 1, "note": "", "tau": 1 / (n + 1), **more,
        }
        for n, f in points.items()
    )  # fmt: skip


def agreement_rows() -> pd.DataFrame:
    rows = []
    for i, model in enumerate(("gpt2", "tiny")):
        for j, kind in enumerate(("resid_pre", "mlp_out")):
            for k, method in enumerate(("atp", "relp")):
                pcc = 0.5 + 0.1 * i + 0.02 * j + 0.2 * k
                rows.append({"task": "ioi", "model": model, "kind": kind, "method": method, "pcc": pcc,
                             "pcc_lo": pcc - 0.05, "pcc_hi": pcc + 0.03, "spearman": pcc / 2, "note": ""})  # fmt: skip
    return pd.DataFrame(rows)
