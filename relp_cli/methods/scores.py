"""`Scores`: what every method returns, and its file format (safetensors with a JSON header)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from relp_cli.errors import RelpError, RunFailed, unknown
from relp_cli.files import write_atomically
from relp_cli.nodes.kinds import NODE_KINDS

SCHEMA = 1
SIGN = "c(n) = L(patched) − L(run); higher L = more of the original behaviour"


def support_sign(meta: Mapping[str, Any]) -> int:
    """What scores are multiplied by so that support of the behaviour is positive: −1 for signed noising scores."""
    return -1 if meta.get("signed", True) and meta.get("direction", "noising") == "noising" else 1


@dataclass(frozen=True)
class NodeScores:
    """Scores of one node kind.

    mean, variance: Float[layer, pos, *unit] over examples (variance unbiased; NaN where n = 1).
    n:              Int[pos], examples that have this position (roles may differ between templates).
    labels:         one label per position; `axis` is "position" (all pairs share one token length and its roles) or
                    "role" (pairs of several lengths, aligned by role).
    examples:       Float[example, layer, pos, *unit] or None; `present`: Bool[example, pos] says where it is defined.
    """

    kind: str
    mean: Float[Tensor, "layer pos *unit"]
    variance: Float[Tensor, "layer pos *unit"]
    n: Int[Tensor, " pos"]
    labels: tuple[str, ...]
    axis: str
    examples: Float[Tensor, "example layer pos *unit"] | None = None
    present: Bool[Tensor, "example pos"] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_nodes(self) -> int:
        return self.mean.numel()

    @property
    def ranked(self) -> tuple[Tensor, ...]:
        """What a selection ranks: its hash ties a circuit to the scores that it came from."""
        return (self.mean,)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of one entry of a score file."""
        tensors = {n: getattr(self, n) for n in ("mean", "variance", "n", "examples", "present")}
        header = {"labels": list(self.labels), "axis": self.axis}
        return {n: t for n, t in tensors.items() if t is not None}, header

    @classmethod
    def from_parts(
        cls, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> NodeScores:
        """What `parts` gave. Raises ValueError for tensors that do not fit together, or are not finite."""
        labels, shape = len(header["labels"]), tuple(tensors["mean"].shape)
        units = (None,) * (len(NODE_KINDS[kind].axes) - 2)
        expect(tensors, mean=(None, labels, *units), variance=shape, n=(labels,), examples=(None, *shape),
               present=(None, labels))  # fmt: skip
        return cls(kind=kind, labels=tuple(header["labels"]), axis=header["axis"], meta=meta, **tensors)


@dataclass(frozen=True)
class Scores(Mapping[str, NodeScores]):
    """Node kind → NodeScores, with the provenance that all kinds share in `meta`."""

    kinds: Mapping[str, NodeScores]
    meta: Mapping[str, Any]

    def __getitem__(self, kind: str) -> NodeScores:
        if kind not in self.kinds:
            raise unknown("node kind in these scores", kind, self.kinds)
        return self.kinds[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self.kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. Tensors are named `kind/mean`; the header is `metadata()['relp']`."""
        tensors: dict[str, Tensor] = {}
        header: dict[str, Any] = {"schema": SCHEMA, "sign": SIGN, "meta": dict(self.meta), "kinds": {}}
        for kind, scores in self.kinds.items():
            parts, header["kinds"][kind] = scores.parts()
            tensors |= {f"{kind}/{name}": value.detach().cpu().contiguous() for name, value in parts.items()}
        write_atomically(Path(path), save(tensors, metadata={"relp": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote. Raises RunFailed for a file that is missing, truncated or of another schema."""
        try:
            with safe_open(str(path), "pt") as stream:
                header = json.loads((stream.metadata() or {}).get("relp", "null"))
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, ValueError) as error:
            raise RunFailed(f"score file {path} cannot be read ({error}); score again to replace it") from error
        if not isinstance(header, dict) or header.get("schema") != SCHEMA:
            raise RunFailed(f"score file {path} was not written by this version of relp (schema {SCHEMA})")
        kinds: dict[str, Any] = {}
        try:
            for kind, about in header["kinds"].items():
                parts = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}
                kinds[kind] = _entry_class(kind).from_parts(kind, parts, about, header["meta"])
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RelpError) as error:
            raise RunFailed(f"score file {path} is damaged ({error}); score again to replace it") from error
        if len({tuple(s.labels) for s in kinds.values()}) != 1 or not isinstance(header["meta"], dict):
            raise RunFailed(
                f"score file {path} is damaged (its kinds have different positions); score again to replace it"
            )
        return cls(kinds, header["meta"])


def expect(tensors: Mapping[str, Tensor], **shapes: tuple[int | None, ...]) -> None:
    """Raises ValueError for tensors of another shape (None: of any size), or that are not finite, but for variances, which
    one example has none of.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
            raise ValueError(f"{name} has shape {list(found)}, expected {[n or 'any' for n in shape]}")
        if "variance" not in name and not tensors[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    if len({len(tensors[name]) for name in ("examples", "present") if name in tensors}) > 1:
        raise ValueError("examples and present are of different lengths")


# Kinds whose scores have a class of their own, in packages above this one: imported when a file holds them.
_ENTRIES = {"edges": "relp_cli.edges.scores:EdgeScores", "feature": "relp_cli.features.scores:FeatureScores"}


def _entry_class(kind: str) -> Any:
    if kind not in _ENTRIES:
        return NodeScores
    module, name = _ENTRIES[kind].split(":")
    return getattr(importlib.import_module(module), name)
