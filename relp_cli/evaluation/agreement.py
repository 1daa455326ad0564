"""Agreement of estimated scores with exact ones: Pearson, Spearman, top-k overlap, slope; bootstrap intervals over pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from relp_cli.errors import RelpError
from relp_cli.spaces.scores import KindScores
from relp_cli.statistics import interval, pearson, resample_counts
from relp_cli.tasks.counted import distinct

AT_ONCE = 1 << 22  # numbers that are made of draws at a time: 16 MiB, several times over


@dataclass(frozen=True)
class Agreement:
    """pcc, spearman, topk: over all nodes (layer × position × unit) of pair-averaged scores; `_lo`, `_hi`: 95 % bootstrap
    over pairs, those that share a prompt together; pcc_per_pair: mean over pairs of each pair's own PCC. slope: of the estimate
    on the exact scores, by least squares through the origin, Σ estimate·exact / Σ exact²: what none of the others sees. 1: as
    large, 2: twice as large, below 0: of the other sign. NaN, with a note, where an array is constant.

    largest: the node whose exact score is farthest from their mean; largest_share: its squared deviation over the sum of all
    (its share of their variance); pcc_without: the PCC over all other nodes, NaN where one side of these is constant.
    """

    pcc: float
    pcc_lo: float
    pcc_hi: float
    pcc_per_pair: float
    spearman: float
    topk: float
    k: int
    slope: float
    largest: str
    largest_share: float
    pcc_without: float
    n_pairs: int
    n_prompts: int
    n_nodes: int
    axis: str
    note: str


def agreement(
    estimate: KindScores, exact: KindScores, k: int = 10, bootstrap: int = 1000, seed: int = 0, unsigned: bool = False
) -> Agreement:
    """How well `estimate` reproduces `exact`; both of one kind, over the same pairs in the same order.

    unsigned: the estimate has no sign (GradDrop, |δ|): it is compared with |exact|.
    Raises: RelpError for scores of different kinds, positions or numbers of pairs.
    """
    if (estimate.kind, estimate.labels, estimate.mean.shape) != (exact.kind, exact.labels, exact.mean.shape):
        raise RelpError(f"cannot compare {estimate.kind} scores of shape {tuple(estimate.mean.shape)} with {exact.kind} "
                        f"scores of shape {tuple(exact.mean.shape)}: they must be of the same kind and positions")  # fmt: skip
    truth = exact.mean.abs() if unsigned else exact.mean
    a, b = estimate.mean.numpy().ravel(), truth.numpy().ravel()
    notes = [f"{who} is constant" for who, x in (("estimate", a), ("reference", b)) if _constant(x)]
    k = min(k, len(a))
    nan = float("nan")
    at = largest(exact, unsigned)
    rest = [np.delete(x, at) for x in (a, b)]
    alone = bool(notes) or any(_constant(x) for x in rest if len(x)) or len(a) < 2
    lo, hi, per_pair = nan, nan, nan
    if bootstrap and estimate.examples is not None and exact.examples is not None and not notes:
        lo, hi, per_pair = _over_pairs(estimate, exact, bootstrap, seed, unsigned)
    return Agreement(
        pcc=nan if notes else float(pearson(a, b)),
        pcc_lo=lo,
        pcc_hi=hi,
        pcc_per_pair=per_pair,
        spearman=nan if notes else float(stats.spearmanr(a, b).statistic),
        topk=nan if notes else len(set(top(a, k)) & set(top(b, k))) / k,
        k=k,
        slope=nan if notes else float(a @ b / (b @ b)),
        largest="" if notes else place_of(exact, at),
        largest_share=nan if notes else float((b[at] - b.mean()) ** 2 / ((b - b.mean()) ** 2).sum()),
        pcc_without=nan if alone else float(pearson(*rest)),
        n_pairs=int(exact.n.max()),
        n_prompts=int(exact.n.max()) if exact.prompts is None else distinct(exact.prompts),
        n_nodes=len(a),
        axis="layer × " + exact.axis + (" × unit" if exact.mean.ndim == 3 else ""),
        note="; ".join(notes),
    )


def largest(exact: KindScores, unsigned: bool = False) -> int:
    """Which entry of the flattened scores (unsigned: of their sizes) is farthest from their mean."""
    scores = (exact.mean.abs() if unsigned else exact.mean).numpy().ravel()
    return int(np.abs(scores - scores.mean()).argmax())


def place_of(exact: KindScores, at: int) -> str:
    """`layer 0, ADJ`, of several units a layer `layer 0, ADJ, unit 3`."""
    layer, position, *unit = np.unravel_index(at, tuple(exact.mean.shape))
    return ", ".join([f"layer {layer}", exact.labels[position], *(f"unit {u}" for u in unit)])


def top(scores: np.ndarray, k: int) -> list[int]:
    """Indices of the k largest |scores|."""
    return np.argsort(-np.abs(scores), kind="stable")[:k].tolist()


def _constant(x: np.ndarray) -> bool:
    return bool(np.ptp(x) <= 1e-9 * max(np.abs(x).max(), 1e-30))


def _over_pairs(
    estimate: KindScores, exact: KindScores, bootstrap: int, seed: int, unsigned: bool
) -> tuple[float, float, float]:
    """(lo, hi, mean per-pair PCC): pairs are resampled, averaged, and correlated again.

    The interval is the pivotal one on Fisher's z: noise in an average of n pairs lowers the PCC once, resampling it lowers
    it again, and reflecting the resampled values at the estimate takes that second bias out.
    """
    assert estimate.examples is not None
    assert exact.examples is not None
    assert exact.present is not None
    if estimate.examples.shape != exact.examples.shape:
        raise RelpError("cannot compare scores over different numbers of pairs")
    n = len(exact.examples)
    # Positions before layers, as they lie in memory: scores of one kind are not copied for it.
    x, y = (scores.transpose(1, 2).reshape(n, -1).numpy() for scores in (estimate.examples, exact.examples))
    present = exact.present.numpy().astype(np.float32)

    def spread(of_positions: np.ndarray) -> np.ndarray:
        """Float[rows, pos] → Float[rows, column]."""
        shape = (exact.mean.shape[1], exact.mean.shape[0], *exact.mean.shape[2:])
        at = of_positions.reshape(-1, shape[0], *(1 for _ in shape[1:]))
        return np.broadcast_to(at, (len(of_positions), *shape)).reshape(len(of_positions), -1)

    def over(rows: np.ndarray, mean_x: np.ndarray, mean_y: np.ndarray) -> np.ndarray:
        return pearson(mean_x, np.abs(mean_y) if unsigned else mean_y, spread(rows))

    def of_means(count: np.ndarray, sum_x: np.ndarray, sum_y: np.ndarray) -> np.ndarray:
        """Of sums over `count` pairs, which become their means."""
        for total in (sum_x, sum_y):
            total /= spread(np.maximum(count, 1))
        return over((count > 0).astype(np.float32), sum_x, sum_y)

    def parts(rows: np.ndarray) -> list[np.ndarray]:
        """In so many rows at a time that what is made of them takes tens of MB, not GB."""
        return np.array_split(rows, max(1, min(len(rows), len(rows) * x.shape[1] // AT_ONCE)))

    with np.errstate(invalid="ignore"):
        own = np.concatenate([over(present[i], x[i], y[i]) for i in parts(np.arange(n))])
    draws = resample_counts(n, bootstrap, seed, exact.prompts).astype(np.float32)
    resampled = []
    for part in parts(draws):
        resampled.append(of_means(part @ present, part @ x, part @ y))
    (center,) = of_means(*(values.sum(0, keepdims=True) for values in (present, x, y)))
    edge = 1 - 1e-7  # atanh(1) is infinite: an estimate equal to the reference keeps the interval [1, 1]
    z, zs = (np.arctanh(np.clip(v, -edge, edge)) for v in (center, np.concatenate(resampled)))
    low, high = interval(zs)
    return float(np.tanh(2 * z - high)), float(np.tanh(2 * z - low)), float(np.nanmean(own))
