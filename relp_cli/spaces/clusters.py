"""Standard errors where examples share prompts: the cluster-robust variance of a mean (Liang and Zeger 1986; Cameron and Miller
2015, their G/(G − 1) correction).

    V(x̄) = G/(G − 1) · Σ_g (Σ_{i∈g} (x_i − x̄))² / n²,    g one of G clusters (original prompts), n examples

Scores hold n·V(x̄) as their `variance`: where every example is its own cluster that is the unbiased variance, and it is never less
than that. Where each prompt is patched from all the others of a short list, means of clusters average over the same patch prompts
and lie closer together than the few words of the list allow: a short list would seem to make scores more certain.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def of_clusters(
    values: Float[Tensor, "example column"],
    present: Bool[Tensor, "example pos"],
    positions: Int[Tensor, " column"],
    clusters: Int[np.ndarray, " example"],
) -> Float[Tensor, " column"]:
    """n·V(x̄) of each column, over the examples that have its position; NaN where they are of one cluster.

    values: 0 where an example does not have the position.
    """
    of, groups = torch.from_numpy(clusters), int(clusters.max()) + 1
    sizes = torch.zeros(groups, present.shape[1], dtype=values.dtype).index_add_(0, of, present.to(values.dtype))
    n, count = sizes.sum(0)[positions], (sizes > 0).sum(0)[positions]
    mean, squares = values.sum(0) / n.clamp(min=1), torch.zeros_like(values[0])
    for group in range(groups):
        squares += (values[of == group].sum(0) - sizes[group, positions] * mean).square()
    return squares / n * _correction(count)


class ClusterSums:
    """What n·V(x̄) needs, while examples come one by one: Σ_g S_g², Σ_g n_g·S_g, Σ_g n_g² and G, with S_g the sum over a cluster.

    S_g is let go with its cluster's last example, so that clusters that come one after the other cost the memory of one.
    """

    def __init__(self, clusters: Int[np.ndarray, " example"], n_pos: int, n_units: int) -> None:
        self.clusters, self.left = clusters.tolist(), np.bincount(clusters).tolist()
        self.open: dict[int, tuple[Tensor, Tensor]] = {}
        self.squares, self.weighted = (torch.zeros(n_pos, n_units, dtype=torch.float64) for _ in range(2))
        self.sizes, self.count = (torch.zeros(n_pos, 1, dtype=torch.float64) for _ in range(2))
        self.row = 0

    def add(self, index: Int[Tensor, " slot"], parts: Iterable[tuple[slice, Float[Tensor, "slot _"]]]) -> None:
        """The next example: its scores by blocks of units, at the positions `index`."""
        group, self.row = self.clusters[self.row], self.row + 1
        if group not in self.open:
            self.open[group] = torch.zeros_like(self.squares), torch.zeros_like(self.sizes)
        total, size = self.open[group]
        for span, values in parts:
            total[:, span].index_add_(0, index, values)
        size[index] += 1
        self.left[group] -= 1
        if not self.left[group]:
            del self.open[group]
            self.sizes += size.square()
            self.count += size > 0
            self.weighted += total * size
            self.squares += total.square_()

    def variance(self, mean: Float[Tensor, "pos unit"], n: Int[Tensor, "pos 1"]) -> Float[Tensor, "pos unit"]:
        """n·V(x̄); NaN where there is one cluster."""
        squares = self.squares - 2 * mean * self.weighted + mean.square() * self.sizes
        return squares.clamp(min=0) / n * _correction(self.count)


def _correction(count: Tensor) -> Tensor:
    """G/(G − 1); NaN where there is one cluster: rounding would make infinity of its squares."""
    return (count / (count - 1)).masked_fill(count < 2, torch.nan)
