"""Node kinds as data: where a node lives in the model, and how a site's tensor splits into nodes. No torch needed to list.

A *site* is one tensor per layer (`Float[batch, pos, width]` at a hook point). A *node* is what is patched as one:
the whole vector at a position ("vector"), one head's slice of it ("head", "kv_head"), or one coordinate ("unit").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from relp_cli.registry import Registry

Split = Literal["vector", "head", "kv_head", "unit"]


@dataclass(frozen=True)
class NodeKind:
    """One row: `hook` is the hook point of layer `{l}`; `split` says how its last axis divides into nodes.

    width:          of units, the field of the model's `Shape` that says how many there are.
    attended:       the attention of its own layer carries it to later positions.
    between_layers: no layer contains it, as the residual stream (`atp_star` drops layers without dropping it).
    carries:        all that lower layers wrote flows through it (the residual stream): where it is ablated, so is all of that.
    """

    name: str
    hook: str
    split: Split
    description: str
    width: str = "d_model"
    attended: bool = False
    between_layers: bool = False
    carries: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of this kind's scores."""
        return (
            ("layer", "pos") if self.split == "vector" else ("layer", "pos", "unit" if self.split == "unit" else "head")
        )

    def point(self, layer: int) -> str:
        return self.hook.format(l=layer)


NODE_KINDS: Registry[NodeKind] = Registry("node kind")
for _row in (
    NodeKind(
        "resid_pre",
        "blocks.{l}.hook_in",
        "vector",
        "residual stream entering the block",
        attended=True,
        between_layers=True,
        carries=True,
    ),
    NodeKind(
        "attn_out", "blocks.{l}.hook_attn_out", "vector", "what attention adds to the residual (after any post-norm)"
    ),
    NodeKind("mlp_out", "blocks.{l}.hook_mlp_out", "vector", "what the MLP adds to the residual (after any post-norm)"),
    NodeKind("head", "blocks.{l}.attn.o.hook_in", "head", "a head's output z = pattern·V, before W_O"),
    NodeKind("query", "blocks.{l}.attn.q.hook_out", "head", "a head's query, before rotary"),
    NodeKind(
        "key",
        "blocks.{l}.attn.k.hook_out",
        "kv_head",
        "a key (shared by its group of heads), before rotary",
        attended=True,
    ),
    NodeKind("value", "blocks.{l}.attn.v.hook_out", "kv_head", "a value (shared by its group of heads)", attended=True),
    NodeKind(
        "mlp_neuron", "blocks.{l}.mlp.out.hook_in", "unit", "MLP hidden unit: act(pre), or act(gate)·up", width="d_mlp"
    ),
    NodeKind("attn_dim", "blocks.{l}.hook_attn_out", "unit", "one output dimension of attention (Marks et al.)"),
    NodeKind("mlp_dim", "blocks.{l}.hook_mlp_out", "unit", "one output dimension of the MLP (Marks et al.)"),
    NodeKind(
        "resid_dim",
        "blocks.{l}.hook_out",
        "unit",
        "one dimension of the residual leaving the block (Marks et al.)",
        between_layers=True,
        carries=True,
    ),
):
    NODE_KINDS.add(_row.name, _row)


def mixed_kinds(kinds: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Of kinds that stand in one circuit, those that carry the others, and the others; None where there are not both.

    Kinds that are no rows (edges, features) are left out.
    """
    rows = [NODE_KINDS[kind] for kind in kinds if kind in NODE_KINDS]
    carrying, carried = (tuple(row.name for row in rows if row.carries is which) for which in (True, False))
    return (carrying, carried) if carrying and carried else None


def mixed_note(kinds: Sequence[str]) -> str:
    """For tables and files: which kinds of a circuit carry which, or ""."""
    mixed = mixed_kinds(kinds)
    return "" if mixed is None else f"mixed kinds: {', '.join(mixed[0])} carries {', '.join(mixed[1])}"


def mixed_warning(kinds: Sequence[str]) -> str:
    """What that means for a circuit's figures, and what to do; "" where no kind carries others."""
    mixed = mixed_kinds(kinds)
    if mixed is None:
        return ""
    carrying, carried = (", ".join(part) for part in mixed)
    return (
        f"WARNING: {carrying} carries all that {carried} of lower layers write, and cutting it in one layer cuts them: "
        "completeness and random circuits are near 0 for nearly any selection, and faithfulness needs the stream of every layer; "
        f"for a circuit of the others alone: --nodes {','.join(mixed[1])}"
    )
