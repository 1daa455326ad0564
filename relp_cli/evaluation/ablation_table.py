"""What a unit outside a circuit is replaced by, as rows. No torch needed to list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from relp_cli.errors import unknown
from relp_cli.registry import Registry, load

if TYPE_CHECKING:
    from torch import Tensor

    from relp_cli.tasks.pairs import PairBatch


@dataclass(frozen=True)
class AblationRow:
    """The values are means over prompts (`means`), or those of another run (`prompts`); of neither: zeros.

    means:      the prompts that means are over, per position; everywhere: over all positions.
    prompts:    `module:function`, (pairs of one length, seed) → the token ids that run in place of each pair's original.
    spaces:     those that know it (none: all). needs_patch: whether it reads patch prompts.
    """

    name: str
    description: str
    spaces: tuple[str, ...] = ()
    needs_patch: bool = True
    means: tuple[str, ...] = ()
    everywhere: bool = False
    prompts: str = ""

    def serves(self, space: str) -> bool:
        return not self.spaces or space in self.spaces

    def tokens(self, pairs: PairBatch, seed: int) -> Tensor | None:
        """Int[pair, pos] whose run gives the values, for all pairs of one length; None where no run does."""
        found: Tensor | None = load(self.prompts)(pairs, seed) if self.prompts else None
        return found


ABLATIONS: Registry[AblationRow] = Registry("ablation")
DONORS = "relp_cli.evaluation.donors"
for _row in (
    AblationRow("mean", "mean over the patch prompts, per position (Marks et al.)", means=("patch",)),
    AblationRow("mean_task", "mean over original and patch prompts, per position", means=("original", "patch")),
    AblationRow("mean_all", "mean over the patch prompts and all positions (EAP-IG: mean)", ("edges",), means=("patch",),
                everywhere=True),
    AblationRow("zero", "zero", needs_patch=False),
    AblationRow("counterfactual", "the pair's own patch run", prompts=f"{DONORS}:own"),
    AblationRow("resample", "the patch run of another, randomly drawn pair of the same length", ("nodes",),
                prompts=f"{DONORS}:another"),
    AblationRow("corpus", "mean over all tokens of a text file, the same at every position", ("nodes",), False,
                ("original",), True),
):  # fmt: skip
    ABLATIONS.add(_row.name, _row)


def ablation_row(name: str, space: str) -> AblationRow:
    """Raises RelpError for an ablation that does not exist, or not for the units of this space."""
    known = [row.name for _, row in ABLATIONS.items() if row.serves(space)]
    if name not in known:
        raise unknown(f"ablation of {space}", name, known)
    return ABLATIONS[name]
