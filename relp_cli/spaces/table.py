"""The spaces: sorts of units that can be scored, kept and ablated. A new space is one module and one row here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from relp_cli.registry import Registry, load

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from relp_cli.spaces.circuit import Circuit
    from relp_cli.spaces.scores import KindScores, Scores
    from relp_cli.spaces.units import Units


Entries = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]  # key → tensors, header


class Space(Protocol):
    """What a space's module says of its units. `view` and `masks` are the shapes that people know; all else that ranks,
    selects, counts or draws works on positions × units.
    """

    def keys(self, units: Units) -> tuple[str, ...]:
        """The names under which scores are looked up."""

    def view(self, scores: Scores, key: str) -> Any:
        """The scores of one key as people know them; the view's `whole` leads back."""

    def table(self, scores: Scores, key: str) -> KindScores:
        """The scores of one key as layers × positions × units."""

    def masks(self, circuit: Circuit) -> dict[str, Tensor]:
        """A circuit's mask as Bool[layer, pos, *unit] tables, by name."""

    def names(self, units: Units, which: Sequence[int]) -> list[str]:
        """Names of units, without positions."""

    def columns(self, circuit: Circuit) -> dict[str, Any]:
        """What a circuit's file says besides schema, type, meta and labels."""

    file_keys: frozenset[str]  # of `columns`
    count: str  # the one that says how many units are kept
    sparse: bool  # most units are 0 in most examples

    def read(self, content: Mapping[str, Any], labels: tuple[str, ...], meta: Mapping[str, Any]) -> Circuit:
        """The circuit of such a file. Raises RelpError (the message alone) for what is wrong in it."""

    def hashed(self, scores: Scores) -> Sequence[Tensor]:
        """What ties a circuit to the scores that it came from."""

    def select(self, scores: Scores, how: Mapping[str, float], options: Mapping[str, Any], **more: Any) -> Circuit:
        """`relp.select` for these units; more: what it takes for these alone."""

    def tensors(self, scores: Scores, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a score file holds of one key: tensors, and header."""

    def from_tensors(self, entries: Entries, meta: Mapping[str, Any]) -> Scores:
        """The scores of a file's entries (key → tensors, header)."""

    def check(self, model: Any, circuit: Circuit) -> None:
        """Raises RelpError unless these are units of this model."""

    def row(self, units: Units, unit: int, position: str) -> dict[str, Any]:
        """kind, layer (of features: the site), position, unit (None for vector nodes; of edges: the name), for tables."""

    def scored(self, scores: Scores, from_layer: int, **more: Any) -> int:
        """How many units of layers ≥ `from_layer`, at all positions, a sweep over counts goes up to."""

    def note(self, circuit: Circuit, ablation: str) -> str:
        """What an evaluation has to say of the circuit, or ""."""

    def about(self, circuits: Sequence[Circuit]) -> dict[str, list[Any]]:
        """Columns that an evaluation's table has for these units alone."""

    def path(self, units: Units, among: Tensor, generator: Generator) -> list[tuple[int, int]]:
        """A random path from the input to the logits: (position, unit), where it can over units of Bool[pos, unit] `among`."""

    def counts(self, circuit: Circuit) -> dict[str, tuple[Tensor, int]]:
        """Per kind, for people: Int[layer, pos], how many units are kept, and how many there are."""


@dataclass(frozen=True)
class SpaceRow:
    """where:    `module:object` (`Space`), imported when a unit of it is met. file: the `type` of its circuit files.
    scorer:      `module:class` (`methods.space.Scorer`), which scores it. ablator: the same (`evaluation.evaluate.Ablator`),
                 which runs a model with units of it ablated.
    spared:      unless asked, an evaluation leaves out this part of the layers, the first ones (3: a third, paper A.2; None:
                 none).
    kinds:       the names by which `nodes=` asks for it (none: all others); its scores are looked up by the first.
    options:     keywords of `relp.score` that are the space's, not the estimator's. noun: for people.
    """

    name: str
    where: str
    scorer: str
    file: str
    ablator: str
    spared: int | None = 3
    kinds: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ("patch", "zero", "mean")
    noun: str = "nodes"

    def load(self) -> Space:
        space: Space = load(self.where)
        return space

    def load_scorer(self) -> Any:
        return load(self.scorer)

    def called(self, kinds: Sequence[str]) -> str:
        """What tables call units of these kinds: by the name they are asked for together, else by their kinds."""
        return next(iter(self.kinds), None) or "+".join(kinds)


SPACES: Registry[SpaceRow] = Registry("space")
for _row in (
    SpaceRow("nodes", "relp_cli.spaces.nodes:NODES", "relp_cli.methods.nodes:Nodes", "relp node circuit",
             "relp_cli.evaluation.node_circuits:NodeAblator"),
    SpaceRow("edges", "relp_cli.spaces.edges:EDGES", "relp_cli.edges.space:Edges", "relp edge circuit",
             "relp_cli.evaluation.edge_circuits:EdgeAblator", None, ("edges",), ("positions",), noun="edges"),
    SpaceRow("features", "relp_cli.spaces.feature_space:FEATURES", "relp_cli.features.space:Features", "relp feature circuit",
             "relp_cli.evaluation.feature_circuits:FeatureAblator", 3, ("feature", "feature_error"), ("dictionary",),
             ("patch", "zero")),
):  # fmt: skip
    SPACES.add(_row.name, _row)


def space_of(units: Units) -> Space:
    """The space that these units are of."""
    return SPACES[units.space].load()


def space_for(kinds: Sequence[str]) -> SpaceRow:
    """The space that `nodes=` asks for."""
    return next((row for _, row in SPACES.items() if kinds and set(kinds) <= set(row.kinds)), SPACES["nodes"])


def space_of_file(kind: str) -> Space:
    """The space whose circuit files are of that `type`."""
    return next(row for _, row in SPACES.items() if row.file == kind).load()
