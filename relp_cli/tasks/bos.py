"""Which BOS token prompts get, and in words who decided: it moves every number, so that every record says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from relp_cli.errors import RelpError


class HasTokenizer(Protocol):
    """What a task needs of a model: its name, a fast Hugging Face tokenizer or None, the BOS id to prepend (None: none),
    and whether that was asked for when it was loaded, rather than TransformerLens's default.
    """

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def bos_asked(self) -> bool: ...


@dataclass(frozen=True)
class Bos:
    """The id that is prepended (None: none), and a sentence on it for outputs."""

    id: int | None
    about: str


def choose_bos(model: HasTokenizer, asked: bool | None) -> Bos:
    """asked: --bos, --no-bos, or None for the model's. Raises: RelpError where there is no BOS token to prepend."""
    token = getattr(model.tokenizer, "bos_token_id", None)
    chosen = model.bos
    if asked is not None:
        chosen = (token if model.bos is None else model.bos) if asked else None
        if asked and chosen is None:
            raise RelpError(f"{model.name} has no BOS token to prepend")
    if chosen is None and token is None:
        return Bos(
            None, "none; there is no BOS token" if model.tokenizer is not None else "none; there is no tokenizer"
        )
    why = "as asked" if asked is not None or model.bos_asked else "TransformerLens's default"
    if model.tokenizer is None:
        return Bos(chosen, f"token {chosen} prepended ({why})")
    name = model.tokenizer.convert_ids_to_tokens(token if chosen is None else chosen)
    adds = model.tokenizer("a")["input_ids"][:1] == [token]
    own = f"the tokenizer itself {'adds it' if adds else 'adds none'}"
    return Bos(
        chosen, f"{name} prepended ({why}; {own})" if chosen is not None else f"no {name} prepended ({why}; {own})"
    )
