"""What `relp circuit --clusters` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from relp_cli.cli.common import log, note, out
from relp_cli.report.tables import show

if TYPE_CHECKING:
    from relp_cli.studies.clustering import Clustered


def show_clusters(made: Clustered) -> None:
    """The verdict, a line per cluster, and the cross-faithfulness matrix."""
    labels = made.groups.labels
    rows = [
        {"cluster": i + 1, "pairs": int((labels == i).sum()), "nodes": circuit.n_nodes, "τ": circuit.meta["selection"]["tau"],
         "for example": made.texts[int(np.argmax(labels == i))]}
        for i, circuit in enumerate(made.circuits)
    ]  # fmt: skip
    out.print(made.verdict)  # above the table: as its title it would be broken to the table's width
    show(pd.DataFrame(rows), out)
    cells = {(r["circuit"], r["pairs"]): r for r in made.table.to_dict("records")}
    n = range(1, len(made.circuits) + 1)
    matrix = [
        {"circuit": str(c)}
        | {
            f"pairs of {p}": f"{r['faithfulness']:.2f} [{r['faithfulness_lo']:.2f}, {r['faithfulness_hi']:.2f}]"
            for p in n
            for r in [cells[c, p]]
        }
        for c in n
    ]
    first = made.table.iloc[0]
    out.print(
        f"cross-faithfulness: circuits of half of each cluster's pairs, on the other half; {first.ablation} ablation from "
        f"layer {first.exclude_layers} up [95 % bootstrap]"
    )
    show(pd.DataFrame(matrix), out)
    for text in dict.fromkeys(made.table.note[made.table.note != ""]):
        note(text)
    log.print(str(made.folder))
