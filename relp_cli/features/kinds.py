"""The names that features go by in jobs, tables and figures: one scoring, three ways to treat error terms. Imports no torch."""

from __future__ import annotations

SCORED = "feature"
# kind → which error terms its circuits have (a row of circuit.ERRORS)
FEATURE_KINDS = {"feature": "all", "feature_no_attn_mlp_errors": "residual", "feature_no_errors": "none"}


def scored_as(kind: str) -> str:
    """The node kind that is scored for a job's kind: "feature" for all of FEATURE_KINDS, the kind itself otherwise."""
    return SCORED if kind in FEATURE_KINDS else kind
