"""`ScoreSpec`: everything that determines a scoring run. Its hash names the result; loading it needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_serializer,
)

from relp_cli import BATCH_SIZE, MOST_SEED
from relp_cli.config.memory import bytes_of
from relp_cli.errors import RelpError, unknown
from relp_cli.methods.table import SPACES, row_of
from relp_cli.nodes.kinds import NODE_KINDS

UNASKED = ("unusable", "ids_of", "memory")


def _bytes(value: Any) -> Any:
    try:
        return bytes_of(value)
    except RelpError as error:
        raise ValueError(str(error)) from error


Memory = Annotated[int, BeforeValidator(_bytes), WithJsonSchema({"type": ["string", "integer"]})]


class Common(BaseModel):
    """What a scoring run, a comparison and a job's grid all say once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pairs: int = Field(default=100, ge=1)
    metric: str | None = None
    baseline: Literal["patch", "zero", "mean"] = "patch"
    bos: bool | None = None
    only_correct: bool = False
    dtype: str = "float32"
    batch_size: int = Field(default=BATCH_SIZE, ge=1)
    memory: Memory | None = None
    unusable: Literal["error", "drop"] | None = None
    ids_of: str | None = None

    @model_serializer(mode="wrap")
    def _unasked(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without those that came later, where they are not given: hashes stay what they were."""
        values: dict[str, Any] = handler(self)
        return {name: v for name, v in values.items() if v is not None or name not in UNASKED}


class ScoreSpec(Common):
    """One scoring run. Raises RelpError for names that are in no table (with the nearest one)."""

    task: str
    model: str = "tiny-gpt2"
    method: str = "relp"
    nodes: tuple[str, ...] = ("resid_pre", "attn_out", "mlp_out")
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    split: Literal["discovery", "heldout", "all"] = "discovery"
    direction: Literal["noising", "denoising"] = "noising"
    keep_examples: bool | None = None
    params: dict[str, Any] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        row_of(method)
        return method

    @field_validator("nodes")
    @classmethod
    def _known_nodes(cls, nodes: tuple[str, ...]) -> tuple[str, ...]:
        alone = {kind: row.kinds[0] for _, row in SPACES.items() for kind in row.kinds}
        if len(nodes) > 1 and set(alone) & set(nodes):
            raise RelpError("edges and features are scored on their own, not beside node kinds")
        for name in nodes:
            if alone.get(name, name) != name:
                raise RelpError(f"error terms are scored together with features: --nodes {alone[name]}")
            if name not in alone and name not in NODE_KINDS:
                raise unknown("node kind", name, [*NODE_KINDS, *dict.fromkeys(alone.values())])
        if len(set(nodes)) < len(nodes):
            raise RelpError(f"node kinds {', '.join(nodes)}: one is there twice")
        return nodes

    def digest(self, **more: str) -> str:
        """Content hash of the spec and of what its names stand for (task hash, model revision, package version)."""
        content = self.model_dump(mode="json") | more
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def method_names(specs: Sequence[ScoreSpec]) -> list[str]:
    """What runs that stand beside each other are called: their methods, with their dtypes where these are several."""
    several = len({spec.dtype for spec in specs}) > 1
    return [f"{spec.method} {spec.dtype}" if several else spec.method for spec in specs]
