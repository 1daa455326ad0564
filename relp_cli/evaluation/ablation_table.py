"""What a unit outside a circuit is replaced by: the names, and which spaces know them. No torch needed to list."""

from __future__ import annotations

from dataclasses import dataclass

from relp_cli.errors import unknown

EVERY = ("nodes", "edges", "features")


@dataclass(frozen=True)
class AblationRow:
    """needs_patch: whether it reads patch prompts."""

    name: str
    description: str
    spaces: tuple[str, ...] = EVERY
    needs_patch: bool = True


ABLATIONS = {
    row.name: row
    for row in (
        AblationRow("mean", "mean over the patch prompts, per position (Marks et al.)"),
        AblationRow("mean_task", "mean over original and patch prompts, per position"),
        AblationRow("mean_all", "mean over the patch prompts and all positions (EAP-IG: mean)", ("edges",)),
        AblationRow("zero", "zero", needs_patch=False),
        AblationRow("counterfactual", "the pair's own patch run"),
        AblationRow("resample", "the patch run of another, randomly drawn pair of the same length", ("nodes",)),
        AblationRow("corpus", "mean over all tokens of a text file, the same at every position", ("nodes",), False),
    )
}


# mean ablation → the prompts that its means are over
MEAN_OF = {"mean": ("patch",), "mean_task": ("original", "patch"), "mean_all": ("patch",)}


def ablation_row(name: str, space: str) -> AblationRow:
    """Raises RelpError for an ablation that does not exist, or not for the units of this space."""
    known = [row.name for row in ABLATIONS.values() if space in row.spaces]
    if name not in known:
        raise unknown(f"ablation of {space}", name, known)
    return ABLATIONS[name]
