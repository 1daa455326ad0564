"""Readers of fixed pairs: our JSON-lines, Marks et al.'s JSON-lines, EAP-IG CSV, auto-circuit JSON.

A file is a list of records; its format is recognised from their keys. Text is used as written; what stands between prompt
and answer is the record's `join`, or `spacing.space_between`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError, nearest
from relp_cli.registry import Registry
from relp_cli.tasks.counted import pairs_text
from relp_cli.tasks.generate import DISCOVERY_SHARE, digest
from relp_cli.tasks.prompt import PromptPair, RawPair
from relp_cli.tasks.records import read_records


@dataclass(frozen=True)
class Form:
    """A file format: its name for people, and the keys of a record, by what they hold.

    original, patch: the two prompts. answer, foil: texts or, with `ids`, token ids. tokens: the prompts are token ids too.
    others: keys that a record may have beside these. Of the former, those in `may` may be missing.
    """

    name: str
    original: str
    patch: str
    answer: str
    foil: str
    others: tuple[str, ...] = ("split",)
    may: tuple[str, ...] = ()
    ids: bool = False
    tokens: bool = False

    @property
    def required(self) -> frozenset[str]:
        return frozenset((self.original, self.patch, self.answer, self.foil)) - {"", *self.may}

    @property
    def optional(self) -> frozenset[str]:
        return frozenset((*self.may, *self.others))


FORMS: Registry[Form] = Registry("pair format")  # where several fit a record, the first is meant
MARKED, JOINED = ("roles", "split"), ("split", "join")
for _row in (
    Form("text", "original", "patch", "answer", "foil", (*MARKED, "join"), ("patch",)),
    Form("text with token-id answers", "original", "patch", "answer_id", "foil_id", MARKED, ("patch",), ids=True),
    Form("token ids", "original_ids", "patch_ids", "answer_id", "foil_id", MARKED, ("patch_ids",), True, True),
    Form("single prompts", "prompt", "", "answer", "foil", (*MARKED, "join"), ("foil",)),
    Form("feature-circuits", "clean_prefix", "patch_prefix", "clean_answer", "patch_answer", JOINED),
    Form("EAP-IG", "clean", "corrupted", "correct_idx", "incorrect_idx", ids=True),
    Form("auto-circuit", "clean", "corrupt", "answers", "wrong_answers", JOINED),
):
    FORMS.add(_row.name, _row)


def read_pairs(path: Path) -> list[RawPair]:
    """All pairs of a file, in order.

    Raises: RelpError `file:line: what was expected` on unreadable files, missing or mixed keys, and wrong values.
    """
    records = read_records(path)
    forms = {_recognise(values, where).name for where, values in records}
    if len(forms) > 1:
        raise RelpError(f"{path}: mixes formats in one file: {', '.join(sorted(forms))}")
    pairs = [pair_of(_recognise(values, where), values, where) for where, values in records]
    if len({pair.split is None for pair in pairs}) > 1:
        raise RelpError(f"{path}: some records have the key 'split' and some have not")
    return pairs


def distinct(pairs: Sequence[RawPair]) -> tuple[list[RawPair], str]:
    """Each pair once, and a note on how many were copies: n counts independent pairs.

    Raises: RelpError for the same prompts and answers with other roles, another split or another join.
    """
    first: dict[object, RawPair] = {}
    for raw in pairs:
        text = replace(raw.pair, roles=(), answer=tuple(sorted(raw.pair.answer)), foil=tuple(sorted(raw.pair.foil)))
        before = first.setdefault((text, raw.ids, raw.outcome_ids), raw)
        for key, a, b in (
            ("split", before.split, raw.split),
            ("roles", (before.pair.roles, before.labels), (raw.pair.roles, raw.labels)),
            ("join", before.join, raw.join),
        ):
            if a != b:
                raise RelpError(f"{raw.where}{key}: the pair of {before.where.strip(': ')} again, with another {key}")
    copies = len(pairs) - len(first)
    note = f"{copies} of {len(pairs)} records are copies of another one: each pair counts once" if copies else ""
    return list(first.values()), note


def assign_splits(pairs: Sequence[RawPair]) -> tuple[list[RawPair], str]:
    """Each pair with its split, and a note on how it was decided.

    A file's own `split` keys are kept. Otherwise pairs that share a prompt stay together, and a share of the pairs is held
    out, whole groups in the order of their hashes, so that no prompt occurs in both splits; where all pairs hang together,
    they are grouped by their originals instead and only those are disjoint.
    """
    if pairs[0].split is not None:
        return list(pairs), "splits as given by the file"
    group: dict[object, object] = {}

    def root(prompt: object) -> object:
        while group.setdefault(prompt, prompt) != prompt:
            prompt = group[prompt]
        return prompt

    for raw in pairs:
        one, two = _prompts(raw)
        if two is not None:
            a, b = sorted((root(one), root(two)), key=repr)
            group[b] = a
    keys, shared = [repr(root(_prompts(raw)[0])) for raw in pairs], "no prompt"
    if len(set(keys)) == 1 and len(pairs) > 1:
        keys = [repr(_prompts(raw)[0]) for raw in pairs]
        shared = "no original prompt (patch prompts repeat across the whole file)"
    held = _held_out(keys)
    split = [
        replace(raw, split="heldout" if key in held else "discovery") for raw, key in zip(pairs, keys, strict=True)
    ]
    count = sum(key in held for key in keys)
    return split, f"splits share {shared}: {pairs_text(len(pairs) - count)} for discovery, {count} held out"


def _held_out(keys: Sequence[str]) -> set[str]:
    """The groups (one key per pair) that are held out: about their share of the pairs, at least one group of several."""
    sizes = Counter(keys)
    room, held = round((1 - DISCOVERY_SHARE) * len(keys)), set[str]()
    for key in sorted(sizes, key=digest):
        if sizes[key] <= room:
            held.add(key)
            room -= sizes[key]
    return held or ({min(sizes, key=lambda key: (sizes[key], digest(key)))} if len(sizes) > 1 else set())


def _prompts(raw: RawPair) -> tuple[object, object | None]:
    return raw.ids if raw.ids is not None else (raw.pair.original, raw.pair.patch)


def _recognise(values: dict[str, Any], where: str) -> Form:
    """The format whose keys these are. Raises: RelpError on missing, mixed, or misspelt keys."""
    keys = set(values)
    forms = [form for _, form in FORMS.items()]
    fitting = [form for form in forms if form.required <= keys]
    best = fitting[0] if fitting else max(forms, key=lambda form: len(keys & (form.required | form.optional)))
    missing = sorted(best.required - keys)
    strange = sorted(keys - best.required - best.optional)
    if missing:
        near = {key: nearest(key, missing) for key in strange}
        hints = "".join(f" ('{key}':{hint[1:]})" for key, hint in near.items() if "did you mean" in hint)
        has = ", ".join(map(repr, list(values)[:8])) + (" …" if len(values) > 8 else "")
        own = f" (the record has {has}); `columns` of a task YAML says which is what (docs/data.md)"
        raise RelpError(f"{where}missing key {', '.join(map(repr, missing))} of the {best.name} format{hints or own}")
    for key in strange:
        if any(key in form.required | form.optional for form in forms):
            raise RelpError(f"{where}key '{key}' does not belong to the {best.name} format: mixed keys")
        if "did you mean" in nearest(key, best.optional):
            raise RelpError(f"{where}unknown key '{key}'{nearest(key, best.optional)}")
    return best


def pair_of(form: Form, values: dict[str, Any], where: str) -> RawPair:
    """One record as a pair."""
    split = values.get("split")
    if split is not None and split not in ("discovery", "heldout"):
        raise RelpError(f"{where}split: expected discovery or heldout, got {shown(split)}")
    join = values.get("join")
    if join is not None and not isinstance(join, str):
        raise RelpError(f"{where}join: expected text, got {shown(join)}")
    ids: tuple[tuple[int, ...], tuple[int, ...] | None] | None = None
    outcome_ids: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    answer: tuple[str, ...] = ()
    foil: tuple[str, ...] = ()
    if form.tokens:
        two = _ids(values, form.patch, where) if form.patch in values else None
        ids = (_ids(values, form.original, where), two)
        original = " ".join(map(str, ids[0]))
        patch = None if two is None else " ".join(map(str, two))
    else:
        original = _string(values, form.original, where)
        patch = _string(values, form.patch, where) if form.patch in values else None
    if form.ids:
        foil_ids = _ids(values, form.foil, where) if form.foil in values else ()
        outcome_ids = (_ids(values, form.answer, where), foil_ids)
    else:
        answer = _strings(values, form.answer, where)
        foil = _strings(values, form.foil, where) if form.foil in values else ()
    roles, labels = _roles(values.get("roles"), original, where)
    pair = PromptPair(original, patch, answer, foil, roles)
    return RawPair(pair, join=join, ids=ids, outcome_ids=outcome_ids, labels=labels, split=split, where=where)


def shown(value: Any) -> str:
    """A wrong value in an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _string(values: dict[str, Any], key: str, where: str) -> str:
    value = values[key]
    if not isinstance(value, str) or not value.strip():
        raise RelpError(f"{where}{key}: expected text, got {shown(value)}")
    return value


def _strings(values: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """One text, or a list of texts."""
    value = values[key] if isinstance(values[key], list) else [values[key]]
    if not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise RelpError(f"{where}{key}: expected text or a list of texts, got {shown(values[key])}")
    return tuple(dict.fromkeys(value))


def _ids(values: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    """One token id, or a list of them (in CSV cells as text)."""
    value = values[key]
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None
    value = value if isinstance(value, list) else [value]
    if not value or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        raise RelpError(f"{where}{key}: expected a token id or a list of token ids, got {shown(values[key])}")
    return tuple(value)


def _roles(value: Any, original: str, where: str) -> tuple[tuple[tuple[str, int, int], ...], tuple[str, ...] | None]:
    """`roles` as character spans {"S1": [4, 8]}, or as a list of one label per token."""
    if value is None:
        return (), None
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return (), tuple(value)
    spans = []
    for role, span in value.items() if isinstance(value, dict) else [("roles", [])]:
        good = isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span)
        if not good or not 0 <= span[0] < span[1] <= len(original):
            raise RelpError(f"{where}roles: expected a label per token, or role: [start, end], got {shown(value)}")
        spans.append((str(role), span[0], span[1]))
    return tuple(spans), None
