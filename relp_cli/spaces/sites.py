"""Where a dictionary sits: the embedding, and per layer the attention's output, the MLP's output and the residual stream.

A site's activation is Float[batch, pos, d_model]. Sites are named as in Marks et al.'s folders (`resid_out_layer3`); their
annotations' short form (`resid_3`) and TransformerLens's hook names (`blocks.3.hook_resid_post`) name them as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering

from relp_cli.errors import RelpError, nearest
from relp_cli.models.model import Model
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind


@dataclass(frozen=True)
class SiteKind:
    """One row: the node kind whose tensor the dictionary encodes, the TransformerLens hook it is trained on, its title."""

    name: str
    node: str
    hook: str
    title: str


# In the order of a forward pass.
SITE_KINDS: dict[str, SiteKind] = {
    row.name: row
    for row in (
        SiteKind("embed", "resid_pre", "hook_embed", "embedding (what enters the first block)"),
        SiteKind("attn", "attn_out", "blocks.{l}.hook_attn_out", "attention output"),
        SiteKind("mlp", "mlp_out", "blocks.{l}.hook_mlp_out", "MLP output"),
        SiteKind("resid", "resid_dim", "blocks.{l}.hook_resid_post", "residual stream leaving the block"),
    )
}
_FORMS = (
    re.compile(r"(?P<kind>attn|mlp|resid)(?:_out)?_(?:layer_?)?(?P<layer>[0-9]{1,6})"),
    re.compile(r"blocks\.(?P<layer>[0-9]{1,6})\.hook_(?P<kind>attn|mlp|resid)_(?:out|post)"),
)
_RESID_PRE = re.compile(r"blocks\.(?P<layer>[0-9]{1,6})\.hook_resid_pre")


@total_ordering
@dataclass(frozen=True)
class Site:
    """One site of a model; the embedding has layer −1. Sites sort in the order of a forward pass."""

    kind: str
    layer: int

    @property
    def name(self) -> str:
        return "embed" if self.kind == "embed" else f"{self.kind}_out_layer{self.layer}"

    @property
    def node_kind(self) -> NodeKind:
        """The kind of vector node that stands at this site (its scores are those of all features and the error)."""
        return NODE_KINDS[SITE_KINDS[self.kind].node]

    @property
    def at(self) -> int:
        """The layer under which `capture` finds the site's tensor."""
        return max(self.layer, 0)

    @property
    def point(self) -> str:
        return self.node_kind.point(self.at)

    @property
    def hook(self) -> str:
        """TransformerLens's name of the hook point."""
        return SITE_KINDS[self.kind].hook.format(l=self.layer)

    def __lt__(self, other: Site) -> bool:
        kinds = list(SITE_KINDS)
        return (self.layer, kinds.index(self.kind)) < (other.layer, kinds.index(other.kind))


def parse_site(name: str) -> Site | None:
    """`embed`, `attn_out_layer0`, `resid_3` or a TransformerLens hook name → the site; None for any other text."""
    if name in ("embed", "hook_embed"):
        return Site("embed", -1)
    for form in _FORMS:
        if match := form.fullmatch(name):
            return Site(match["kind"], int(match["layer"]))
    if match := _RESID_PRE.fullmatch(name):
        layer = int(match["layer"])
        return Site("resid", layer - 1) if layer else Site("embed", -1)
    return None


def all_sites(model: Model) -> tuple[Site, ...]:
    """Every site of a model, in the order of a forward pass."""
    layers = [Site(kind, layer) for layer in range(model.shape.n_layers) for kind in ("attn", "mlp", "resid")]
    return (Site("embed", -1), *layers)


def must_be_site(name: str) -> Site:
    """The site of that name, of some model. Raises RelpError for a name that is none."""
    site = parse_site(name)
    if site is None:
        raise RelpError(
            f"unknown site '{name}'{nearest(name, ['embed', *(f'{k}_out_layer0' for k in ('attn', 'mlp', 'resid'))])}"
        )
    return site


def site_of(name: str, model: Model) -> Site:
    """The model's site of that name. Raises RelpError for a name that is none, and for a layer the model has not."""
    site = must_be_site(name)
    if site.layer >= model.shape.n_layers:
        raise RelpError(
            f"site {site.name}: model {model.name} has {model.shape.n_layers} layers (0 to {model.shape.n_layers - 1})"
        )
    return site
