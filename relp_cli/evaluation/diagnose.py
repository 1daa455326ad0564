"""Where and why a gradient method fails on a task, and which method the evidence recommends (`relp diagnose`).

1. The three failure modes are measured (`failure_modes.py`), and every candidate method scores every node.
2. A node is *suspect* where its failure mode is present and a method that repairs this mode moves its score by more
   than `floor` (a share of the mean |L(patch) − L(original)|); with no mode present, where the secants of all layers do.
3. The strongest suspects are patched exactly, and as many unsuspected nodes, drawn at random, as controls.
4. Their errors are split by what causes them (`causes.py`): norms, MLPs, attention, several at once, unknown.
5. A method's error is Σ|estimate − exact| / Σ|exact| over the patched nodes. Recommended is the cheapest method that is
   not measurably worse than the best (paired bootstrap over nodes, 95 %) and whose error is at most 1.25 times the best's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.evaluation import failure_modes as modes
from relp_cli.evaluation.causes import SECANT, causes_table, column_of, in_words, secants_alone, whys
from relp_cli.evaluation.verify import exact_scores
from relp_cli.methods.request import Progress
from relp_cli.methods.score import position_axis
from relp_cli.models.model import Model
from relp_cli.scoring import score
from relp_cli.spaces.scores import Scores
from relp_cli.statistics import interval, resample_counts
from relp_cli.tasks.pairs import PairBatch

KINDS = ("query", "key", "value", "attn_out", "mlp_out", "resid_pre")
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "atp": ("atp", {}),
    "atp_star": ("atp_star", {"grad_drop": False}),
    "relp": ("relp", {}),
    "relp+two_point": ("relp+two_point", {}),
    "ig_inputs": ("ig_inputs", {"steps": 10}),
    SECANT: (SECANT, {}),
}
THOROUGH: dict[str, tuple[str, dict[str, Any]]] = {
    "ig_activations": ("ig_activations", {"steps": 5})
}  # per layer and kind
SATURATION, CANCELLATION, FLAT, OTHER = "saturated attention", "cancellation", "flat gradient", "none of these modes"
# What reveals a mode: AtP*'s softmax, secants, which see each part's own change, the gradient on the way to the source.
REPAIRS = {SATURATION: "atp_star", CANCELLATION: SECANT, FLAT: "ig_inputs", OTHER: SECANT}
CLOSE = 1.25  # an error at most this many times the best one's may be preferred for being cheaper


@dataclass(frozen=True)
class Options:
    """What counts as a failure mode, and how much is checked.

    saturated: largest attention probability from which a softmax is called saturated (on the run). moved: least share of
    attention that the patch (for query nodes: of the query alone) must move. cancelled: least share of a component's
    effect that cancels. flat: gradient norm at the run below this share of its mean along the path. floor: least change
    of a score that matters, as a share of the mean |L(patch) − L(original)|. top: how many suspects, and how many
    controls, are patched per node kind. thorough: ig_activations is a candidate too (passes per layer and kind).
    """

    saturated: float = 0.9
    moved: float = 0.2
    cancelled: float = 0.5
    flat: float = 0.5
    floor: float = 0.01
    top: int = 10
    thorough: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What was found; all tables are for people and for JSON.

    attention: per layer, head and query role: entropy and largest probability on run and source, share moved.
    cancelling: per component: direct effect, total, what cancels and between which layers.
    gradient: per point of the path and layer: gradient norm relative to its mean along the path; the metric.
    nodes: one row per node: every method's estimate, `reason` ("" where trusted), `exact` (NaN where not patched), `why`: what
    the error of `cheap` is made of, in shares of it (`causes.whys`).
    causes: one row per cause of errors: its share of Σ|error| over the patched nodes (`causes.causes_table`).
    methods: one row per candidate: error on the patched nodes with interval, on suspects, on controls; cost.
    """

    attention: pd.DataFrame
    cancelling: pd.DataFrame
    gradient: pd.DataFrame
    nodes: pd.DataFrame
    causes: pd.DataFrame
    methods: pd.DataFrame
    cheap: str
    recommended: str
    floor: float
    summary: tuple[str, ...]

    @property
    def suspects(self) -> pd.DataFrame:
        """Nodes whose cheap estimate should not be trusted, the most suspect first."""
        rows = self.nodes[self.nodes.reason != ""]
        return rows.sort_values("moved", ascending=False, ignore_index=True)


def check_candidate(method: str) -> None:
    """Raises RelpError for a method that cannot be diagnosed."""
    if method not in CANDIDATES:
        raise unknown("method to diagnose", method, CANDIDATES)


def diagnose(
    model: Model,
    pairs: Sequence[PairBatch],
    metric: str = "logit_diff",
    direction: str = "noising",
    cheap: str = "atp",
    options: Options | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Diagnose the method `cheap` (of CANDIDATES) on these pairs.

    Raises: RelpError for a metric without gradient at the run, for an unknown method, and for answers of several tokens.
    """
    check_candidate(cheap)
    if any(batch.several for batch in pairs):
        raise RelpError(
            "diagnose takes answers of single tokens: its failure modes and atp_star read one run of a prompt, answers of "
            "several tokens need two; use relp compare"
        )
    limits = options or Options()
    if limits.top < 1:
        raise RelpError(f"top: expected at least 1 suspect to patch, got {limits.top}")
    estimates = {
        name: score(model, pairs, method, KINDS, metric, direction, keep_examples=False, progress=progress, **params)
        for name, (method, params) in (CANDIDATES | THOROUGH if limits.thorough else CANDIDATES).items()
    }
    secants = secants_alone(model, pairs, KINDS, metric, direction, progress) if cheap == "atp" else {}
    attention = modes.saturation(model, pairs, metric, direction)
    cancelling = modes.cancellation(model, pairs, metric, direction)
    gradient = modes.flat_gradients(model, pairs, metric, direction)
    floor = limits.floor * float((gradient.metric[-1] - gradient.metric[0]).abs().mean())
    nodes = _nodes(estimates, _present(attention, cancelling, gradient, estimates[cheap], limits, floor))
    for cause, scores in secants.items():
        nodes[column_of(cause)] = np.concatenate([scores[kind].mean.numpy().ravel() for kind in KINDS])
    _suspect(nodes, cheap, floor)
    chosen = _chosen(nodes, cheap, limits.top, seed)
    masks = {kind: torch.from_numpy(chosen[(nodes.kind == kind).to_numpy()]).view(estimates[cheap][kind].mean.shape)
             for kind in KINDS}  # fmt: skip
    exact = exact_scores(model, pairs, masks, estimates[cheap].meta, progress)
    nodes["exact"] = np.where(chosen, np.concatenate([exact[k].mean.numpy().ravel() for k in KINDS]), np.nan)
    nodes["why"] = whys(nodes, cheap)
    causes, table = causes_table(nodes, cheap), _methods(nodes, estimates, seed)
    good = table[table.not_worse & (table.error <= CLOSE * table.error.min())]
    recommended = str(good.sort_values(["passes", "error"]).iloc[0].method)
    _, labels = position_axis(pairs)
    return Diagnosis(
        attention=modes.attention_table(attention, labels),
        cancelling=modes.cancelling_table(cancelling, labels),
        gradient=modes.gradient_table(gradient),
        nodes=nodes,
        causes=causes,
        methods=table,
        cheap=cheap,
        recommended=recommended,
        floor=floor,
        summary=_summary(attention, gradient, nodes, causes, table, (cheap, recommended, floor, limits)),
    )


def _present(
    attention: modes.Saturation,
    cancelling: Mapping[str, modes.Cancellation],
    gradient: modes.FlatGradients,
    base: Scores,
    limits: Options,
    floor: float,
) -> dict[str, dict[str, Tensor]]:
    """kind → failure mode → Bool[layer, pos, *unit]: where the mode is there."""
    saturated = (attention.max_run >= limits.saturated) & (attention.moved_by_query >= limits.moved)
    flat = gradient.relative.median(-1).values < limits.flat
    out: dict[str, dict[str, Tensor]] = {}
    for kind in KINDS:
        shape = base[kind].mean.shape
        out[kind] = {
            FLAT: flat.view(-1, *[1] * (len(shape) - 1)).expand(shape),
            OTHER: torch.ones(shape, dtype=torch.bool),
        }
        if kind == "query":
            out[kind][SATURATION] = saturated
        elif kind == "key":  # read by every later query of its group: exposed where any of them is saturated
            heads = (attention.max_run >= limits.saturated).any(1).unflatten(-1, (shape[2], -1)).any(-1)
            out[kind][SATURATION] = heads[:, None].expand(shape)
        elif kind in cancelling:
            out[kind][CANCELLATION] = (cancelling[kind].share >= limits.cancelled) & (cancelling[kind].offset > floor)
    return out


def _nodes(estimates: Mapping[str, Scores], present: Mapping[str, Mapping[str, Tensor]]) -> pd.DataFrame:
    """One row per node: where it is, every method's estimate, and which failure modes are there."""
    parts = []
    for kind in KINDS:
        base = next(iter(estimates.values()))[kind]
        at = np.unravel_index(np.arange(base.mean.numel()), base.mean.shape)
        columns: dict[str, object] = {"kind": kind, "layer": at[0], "position": np.array(base.labels)[at[1]],
                                      "unit": at[2] if len(at) == 3 else -1}  # fmt: skip
        columns |= {name: scores[kind].mean.numpy().ravel() for name, scores in estimates.items()}
        columns |= {m: present[kind][m].numpy().ravel() if m in present[kind] else False for m in REPAIRS}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _repair(mode: str, cheap: str) -> str:
    """The mode's repair; another where that is what is diagnosed."""
    other = SECANT if cheap == "ig_inputs" else "ig_inputs"
    return other if REPAIRS[mode] == cheap else REPAIRS[mode]


def _suspect(nodes: pd.DataFrame, cheap: str, floor: float) -> None:
    """Add `reason` (the first mode that is there and whose repair moves the score), `repair` and `moved`."""
    nodes["reason"], nodes["repair"], nodes["moved"] = "", "", 0.0
    for mode in REPAIRS:
        repair = _repair(mode, cheap)
        moved = (nodes[repair] - nodes[cheap]).abs()
        new = nodes[mode] & (moved > floor) & (nodes.reason == "")
        nodes.loc[new, ["reason", "repair"]] = mode, repair
        nodes.loc[new, "moved"] = moved[new]


def _chosen(nodes: pd.DataFrame, cheap: str, top: int, seed: int) -> np.ndarray:
    """Bool[node]: per kind the strongest suspects, and as many random controls among the unsuspected that are not 0."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(nodes), dtype=bool)
    for kind in KINDS:
        ours = nodes[nodes.kind == kind]
        suspects = ours[ours.reason != ""].nlargest(top, "moved").index
        free = ours[(ours.reason == "") & (ours[cheap].abs() > 1e-9)].index.to_numpy()
        chosen[suspects] = True
        chosen[free[rng.permutation(len(free))[:top]]] = True
    return chosen


def _methods(nodes: pd.DataFrame, estimates: Mapping[str, Scores], seed: int, draws: int = 2000) -> pd.DataFrame:
    """Σ|estimate − exact| / Σ|exact| over the patched nodes; `not_worse`: than the best, by a paired bootstrap."""
    patched = nodes[nodes.exact.notna()]
    if patched.empty or not patched.exact.abs().sum() > 0:
        raise RelpError("diagnose: no patched node has any effect; the patch changes nothing that the metric sees")
    wrong = np.stack([(patched[name] - patched.exact).abs() for name in estimates], 1)  # [node, method]
    size, suspect = patched.exact.abs().to_numpy(), (patched.reason != "").to_numpy()
    weights = resample_counts(len(patched), draws, seed)
    resampled = (weights @ wrong) / np.maximum(weights @ size, 1e-300)[:, None]
    errors = wrong.sum(0) / size.sum()
    best = int(errors.argmin())
    low, high = interval(resampled)
    gap, _ = interval(resampled - resampled[:, [best]])
    rows = []
    for i, (name, scores) in enumerate(estimates.items()):
        part: dict[str, Any] = {what: wrong[m, i].sum() / size[m].sum() if size[m].sum() > 0 else float("nan")
                for what, m in (("error_suspects", suspect), ("error_controls", ~suspect))}  # fmt: skip
        passes = scores.meta["forwards_per_pair"] + 2 * scores.meta["backwards_per_pair"]
        rows.append(
            {"method": name, "error": errors[i], "lo": low[i], "hi": high[i], **part,
             "sign": float((np.sign(patched[name]) == np.sign(patched.exact))[size > 0].mean()),
             "not_worse": bool(gap[i] <= 0), "passes": passes, "seconds": scores.meta["seconds"]}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _summary(
    attention: modes.Saturation,
    gradient: modes.FlatGradients,
    nodes: pd.DataFrame,
    causes: pd.DataFrame,
    table: pd.DataFrame,
    settings: tuple[str, str, float, Options],
) -> tuple[str, ...]:
    """Sentences for people."""
    cheap, recommended, floor, limits = settings
    saturated = attention.max_run >= limits.saturated
    moving = saturated & (torch.maximum(attention.moved, attention.moved_by_query) >= limits.moved)
    flat = (gradient.relative < limits.flat).double().mean(-1)
    lines = [
        f"attention: {int(moving.sum())} of {moving.numel()} (layer, head, query) patterns are saturated on the run (largest "
        f"probability ≥ {limits.saturated:g}) and moved by the patch (≥ {limits.moved:g}); {int(saturated.sum())} are saturated",
        f"gradient: the run lies in a flat region for {100 * flat.max().item():.0f} % of the pairs (norm < {limits.flat:g} of "
        f"its mean along the path; worst layer {int(flat.argmax())})",
    ]
    for mode in REPAIRS:
        repair = _repair(mode, cheap)
        ours = nodes[nodes.reason == mode]
        checked = ours[ours.exact.notna()]
        wrong = (checked[cheap] - checked.exact).abs()
        repaired = (checked[repair] - checked.exact).abs()
        if ours.empty:
            lines.append(f"{mode}: no node")
            continue
        text = f"{mode}: {len(ours)} nodes whose {cheap} score {repair} moves by more than {floor:.3g}"
        if len(checked):
            text += (
                f"; of {len(checked)} patched exactly {int((wrong > floor).sum())} were wrong by more than that, "
                f"{int((repaired > floor).sum())} after repair (Σ|error| {wrong.sum():.3g} → {repaired.sum():.3g})"
            )
        lines.append(text)
    of_causes = in_words(dict(zip(causes.cause, causes.share, strict=True)), 0.01)
    lines.append(f"why {cheap} is off, in shares of its Σ|error| over the patched nodes: {of_causes}")
    controls = nodes[(nodes.reason == "") & nodes.exact.notna()]
    bad = int(((controls[cheap] - controls.exact).abs() > floor).sum())
    lines.append(f"controls: {bad} of {len(controls)} unsuspected nodes were wrong by more than {floor:.3g}")
    row, base = (table.set_index("method").loc[name] for name in (recommended, cheap))
    lines.append(
        f"recommended: {recommended}, error {row.error:.3f} [{row.lo:.3f}, {row.hi:.3f}] of Σ|effect| at {row.passes:g} passes a "
        f"pair (a backward counts 2); {cheap}: {base.error:.3f} [{base.lo:.3f}, {base.hi:.3f}] at {base.passes:g}; "
        f"exact patching of all {len(nodes)} nodes: {len(nodes)}"
    )
    same = table[table.passes <= base.passes].sort_values("error").iloc[0]
    if same.method != recommended:
        lines.append(f"at the cost of {cheap}: {same.method}, error {same.error:.3f} [{same.lo:.3f}, {same.hi:.3f}]")
    return tuple(lines)
