"""Sentence templates: literal text with slots.

`{PLACE}` is the slot's word, `{NOUN.pl}` its form `pl`, `{NOUN[NUM]}` the form named by the word of slot NUM, and
`{S1=B}` gives this mention of slot B the position role S1 (otherwise the role is the slot's own name).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from relp_cli.tasks.words import Row

RESERVED = ("bos", "start", "end")
_SLOT = re.compile(r"\{(?:(\w+)=)?(\w+)(?:\.(\w+)|\[(\w+)\])?\}")


@dataclass(frozen=True)
class Mention:
    """One slot in a text: which slot, which form of its word (by name or by another slot), and its role."""

    role: str
    slot: str
    column: str | None = None
    index: str | None = None

    def word(self, words: Mapping[str, Row], slot: str | None = None) -> str:
        """The word that this mention shows, given each slot's row; or another slot's word in the same form."""
        return words[slot or self.slot].form(words[self.index].key if self.index else self.column)


@dataclass(frozen=True)
class Text:
    """A rendered template: the text and the character span of each mention, in order."""

    text: str
    spans: tuple[tuple[Mention, int, int], ...]


@dataclass(frozen=True)
class Template:
    """Literal pieces and mentions, in order."""

    parts: tuple[str | Mention, ...]

    @cached_property
    def mentions(self) -> tuple[Mention, ...]:
        return tuple(part for part in self.parts if isinstance(part, Mention))

    def render(self, words: Mapping[str, Row], roles: Mapping[str, str] | None = None) -> Text:
        """Fill the slots. `roles` shows, at the mention of a role, another slot's word in the same form."""
        text, spans, instead = "", [], roles or {}
        for part in self.parts:
            if isinstance(part, str):
                text += part
                continue
            word = part.word(words, instead.get(part.role))
            spans.append((part, len(text), len(text) + len(word)))
            text += word
        return Text(text, tuple(spans))


def parse(text: str) -> Template:
    """Parse a template. Raises: ValueError on a stray brace and on a role used twice."""
    parts: list[str | Mention] = []
    end = 0
    for match in _SLOT.finditer(text):
        if match.start() > end:
            parts.append(text[end : match.start()])
        role, slot, column, index = match.groups()
        parts.append(Mention(role or slot, slot, column, index))
        end = match.end()
    if end < len(text):
        parts.append(text[end:])
    for part in parts:
        if isinstance(part, str) and ("{" in part or "}" in part):
            raise ValueError(f"'{part.strip()}' has a brace that is no slot like {{NAME}}, {{ROLE=NAME}}, {{NAME[N]}}")
    roles = [part.role for part in parts if isinstance(part, Mention)]
    for role in roles:
        if role in RESERVED:
            raise ValueError(f"role '{role}' is given by position; choose another name")
        if roles.count(role) > 1:
            raise ValueError(f"role '{role}' occurs twice; name each mention, as in {{{role}1={role}}}")
    return Template(tuple(parts))
