"""Text pairs → token ids of equal length, with a role per position. Never padding, never truncation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from relp_cli.errors import RelpError
from relp_cli.tasks.columns import WordSet
from relp_cli.tasks.encoder import Encoder, Offsets
from relp_cli.tasks.generate import Vocabulary
from relp_cli.tasks.prompt import RawPair
from relp_cli.tasks.spec import TaskText
from relp_cli.tasks.template import Mention, Template, Text
from relp_cli.tasks.words import Row


@dataclass(frozen=True)
class TokenPair:
    """One pair as token ids, BOS included: `original` and `patch` of one length, a role per position.

    written: whether the prompts started with BOS as they were given. several: answer and foil are sequences of tokens, not sets.
    """

    original: tuple[int, ...]
    patch: tuple[int, ...] | None
    answer: tuple[int, ...]
    foil: tuple[int, ...]
    roles: tuple[str, ...]
    written: bool = False
    several: bool = False

    @property
    def group(self) -> tuple[object, ...]:
        """What the pairs of one batch have in common; the first is the token length."""
        return len(self.roles), self.roles, *((len(self.answer), len(self.foil)) if self.several else ())


def vocabulary(task: TaskText, encoder: Encoder, several: bool = False) -> Vocabulary:
    """The rows whose words are single tokens wherever the task needs that, and a check of slots that touch.

    several: answers may be of several tokens.

    Raises: RelpError naming list and model where no row is left.
    """
    kept: dict[str, tuple[Row, ...]] = {}
    for name, words in task.lists.items():
        contexts, endings = _contexts(task, name), () if several else _endings(task, name)
        kept[name] = tuple(
            row
            for row in words.rows
            if all(_in_text(encoder, row.form(column), lefts, rights) for lefts, column, rights in contexts)
            and all(_is_outcome(encoder, task, prompt, row.form(column)) for prompt, column in endings)
        )
        if not kept[name]:
            word = words.rows[0].key
            raise RelpError(
                f"task '{task.spec.name}': no word of list '{name}' is a single token of {encoder.name} where the task "
                f"needs one (for example '{word}': {encoder.pieces(encoder.encode(' ' + word)[0])})"
            )

    def accepts(text: Text) -> bool:
        """Whether each of two slots that touch is a token of its own."""
        for (one, start, middle), (two, also, end) in itertools.pairwise(text.spans):
            if middle == also and (task.single(one.slot) or task.single(two.slot)):
                left, right = text.text[:start], text.text[end:]
                left = left[len(left.rstrip()) - len((left.split() or [""])[-1]) :]
                if not encoder.single(left, text.text[start:middle], text.text[middle:end] + right):
                    return False
                if not encoder.single(left + text.text[start:middle], text.text[middle:end], right):
                    return False
        return True

    return Vocabulary(kept, accepts)


def _in_text(encoder: Encoder, word: str, lefts: Sequence[str], rights: Sequence[str]) -> bool:
    return any(encoder.single(left, word, right) for left in lefts for right in rights)


def _is_outcome(encoder: Encoder, task: TaskText, prompt: str, word: str) -> bool:
    (ids,) = encoder.outcomes(prompt, [word], task.spec.join)
    return encoder.is_outcome(ids)


def _columns(task: TaskText, mention: Mention) -> list[str | None]:
    if mention.index is None:
        return [mention.column]
    return [row.key for row in task.lists[task.slot_lists[mention.index]].rows]


def _contexts(task: TaskText, name: str) -> set[tuple[tuple[str, ...], str | None, tuple[str, ...]]]:
    """(texts before, form, texts after) of each place where a word of list `name` must be a single token.

    There are several texts where another slot touches this one; one of them has to leave the word whole.
    """
    found = set()
    for template in task.templates:
        for i, part in enumerate(template.parts):
            if not isinstance(part, Mention):
                continue
            sources = {part.slot, task.slot_patch.get(part.slot), task.role_patch.get(part.role)}
            if any(task.slot_lists[slot] == name and task.single(slot) for slot in sources if slot):
                after = template.parts[i + 1] if i + 1 < len(template.parts) else ""
                rights = (after,) if isinstance(after, str) else _words(task, after)
                found |= {(_before(task, template, i), column, rights) for column in _columns(task, part)}
    return found


def _before(task: TaskText, template: Template, i: int) -> tuple[str, ...]:
    """What may stand before part i, back to the last space."""
    if i == 0:
        return ("",)
    before = template.parts[i - 1]
    if isinstance(before, Mention):
        left = _before(task, template, i - 1)[0]
        return tuple(left + word for word in _words(task, before))
    words = before.split()
    return (before[before.rindex(words[-1]) :] if words else "a" + before,)


def _words(task: TaskText, mention: Mention) -> tuple[str, ...]:
    rows = task.lists[task.slot_lists[mention.slot]].rows
    return tuple(row.form(column) for row in rows for column in _columns(task, mention))


def _endings(task: TaskText, name: str) -> set[tuple[str, str | None]]:
    """(prompt, form) of each place where a word of list `name` is an answer or foil."""
    forms: set[str | None] = set()
    for outcome in (*task.answer, *task.foil):
        if isinstance(outcome, WordSet):
            forms |= {None} if outcome.list == name else set()
        elif outcome.slot and name in {
            task.slot_lists[slot] for slot in (outcome.slot, task.slot_patch.get(outcome.slot)) if slot
        }:
            forms |= set(_columns(task, outcome))
    first = {slot: task.lists[source].rows[0] for slot, source in task.slot_lists.items()}
    return {(template.render(first).text, form) for template in task.templates for form in forms}


def tokenise(raw: RawPair, encoder: Encoder, several: bool = False) -> TokenPair:
    """One pair as token ids. Prompts that start with BOS themselves get no other one. several: answer and foil are one text each,
    of as many tokens as they have.

    Raises: RelpError where the prompts' token lengths differ, where they differ outside the spans that the pairing
    rule changes (both show the two tokenisations), where one of them starts with BOS, on unknown tokens, and on answers
    of several tokens.
    """
    pair, where = raw.pair, raw.where
    patch: tuple[int, ...] | None
    if raw.ids is not None:
        original, patch = raw.ids
        offsets: Offsets = []
    else:
        original, offsets = encoder.known(pair.original, where)
        patch = None
        if pair.patch is not None:
            patch, patch_offsets = encoder.known(pair.patch, where)
            _check_aligned(raw, encoder, (original, offsets), (patch, patch_offsets))
    if patch is not None and len(original) != len(patch):
        raise RelpError(f"{where}original has {len(original)} token ids, patch {len(patch)}; pairs are never padded")
    if raw.outcome_ids is not None:
        answer, foil = raw.outcome_ids
        encoder.check_known((*answer, *foil, *(original if raw.ids is not None else ())), where)
        if several and max(len(answer), len(foil)) > 1:
            raise RelpError(f"{where}token ids in a list are a set of answers; give answers of several tokens as text")
    elif several:
        answer, foil = _sequences(raw, encoder)
    elif raw.first:
        answer, foil = encoder.first_ids(pair.original, pair.answer[0], pair.foil[0], raw.join, where)
    else:
        answer, foil = _outcomes(raw, encoder)
    if not several and set(answer) & set(foil):
        raise RelpError(f"{where}answer and foil share the token {encoder.pieces(sorted(set(answer) & set(foil))[:1])}")
    written = _starts_with_bos(encoder, original, patch, where)
    bos = original[:1] if written else () if encoder.bos is None else (encoder.bos,)
    if written:
        original, patch, offsets = original[1:], None if patch is None else patch[1:], offsets[1:]
    roles = ("bos",) * len(bos) + _labels(raw, original, patch, offsets, written)
    return TokenPair(bos + original, None if patch is None else bos + patch, answer, foil, roles, written, several)


def _outcomes(raw: RawPair, encoder: Encoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of answer and foil. Words of lists that are no single tokens are left out, of both where they are rows."""
    pair, sides = raw.pair, list[list[int | None]]()
    for name, texts in (("answer", pair.answer), ("foil", pair.foil)):
        listed = raw.listed in (name, "both", "rows")
        known = encoder.members if listed else encoder.outcome_ids
        sides.append(list(known(pair.original, texts, raw.join, raw.where)) if texts else [])
    if raw.listed == "rows":
        rows = [row for row in zip(*sides, strict=True) if None not in row]
        if not rows:
            raise RelpError(f"{raw.where}no row of the answers' list has single tokens of {encoder.name} in both forms")
        sides = [list(side) for side in zip(*rows, strict=True)]
    answer, foil = (tuple(token for token in side if token is not None) for side in sides)
    return answer, foil


def _sequences(raw: RawPair, encoder: Encoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All tokens of an answer and a foil. Raises RelpError for sets of them, and where one begins with the other."""
    pair = raw.pair
    if raw.listed or len(pair.answer) != 1 or len(pair.foil) > 1:
        raise RelpError(
            f"{raw.where}metric answer_logprob needs one answer and at most one foil, got {len(pair.answer)} and {len(pair.foil)}"
        )
    answer, *foils = (encoder.sequence(pair.original, text, raw.join, raw.where) for text in (*pair.answer, *pair.foil))
    foil = foils[0] if foils else ()
    shared = min(len(answer), len(foil))
    if foil and answer[:shared] == foil[:shared]:
        raise RelpError(
            f"{raw.where}of answer {encoder.pieces(answer)} and foil {encoder.pieces(foil)} one begins with the other, which is "
            "always the less probable"
        )
    return answer, foil


def _starts_with_bos(encoder: Encoder, original: tuple[int, ...], patch: tuple[int, ...] | None, where: str) -> bool:
    starts = {ids[0] == encoder.own_bos for ids in (original, patch) if ids is not None}
    if len(starts) > 1:
        raise RelpError(f"{where}one of original and patch starts with the BOS token, the other does not")
    return starts.pop() and len(original) > 1


def _check_aligned(
    raw: RawPair, encoder: Encoder, one: tuple[tuple[int, ...], Offsets], two: tuple[tuple[int, ...], Offsets]
) -> None:
    (a, a_spans), (b, b_spans) = one, two

    def shown() -> str:
        return f"original {encoder.pieces(a)} ({len(a)}) / patch {encoder.pieces(b)} ({len(b)})"

    if len(a) != len(b):
        raise RelpError(f"{raw.where}original and patch have different token lengths: {shown()}")
    if a == b:
        raise RelpError(f"{raw.where}original and patch are the same tokens: {encoder.pieces(a)}")
    if raw.changed is None:
        return
    for x, y, x_span, y_span in zip(a, b, a_spans, b_spans, strict=True):
        if x != y and not any(_touches(x_span, old) and _touches(y_span, new) for old, new in raw.changed):
            raise RelpError(f"{raw.where}original and patch differ where the pairing rule changes nothing: {shown()}")


def _touches(token: tuple[int, int], span: tuple[int, int]) -> bool:
    return token[0] < span[1] and token[1] > span[0]


def _labels(
    raw: RawPair, original: tuple[int, ...], patch: tuple[int, ...] | None, offsets: Offsets, written: bool
) -> tuple[str, ...]:
    """One label per token (BOS apart). A span's tokens are `S1`, `S1.1`, ...; others count from the anchor before
    them (`S1+1`); the first anchor is `start`, the last token is always `end`.

    A file without roles is anchored where original and patch differ: `diff`, `diff2`, ... A file's own labels may repeat
    (their positions are then scored jointly), but none is `bos`. written: they may count the BOS that the prompt starts
    with.
    """
    if raw.labels is not None:
        labels = raw.labels[1:] if written and len(raw.labels) == len(original) + 1 else raw.labels
        if len(labels) != len(original):
            raise RelpError(f"{raw.where}{len(labels)} roles for {len(original)} tokens (BOS is not counted)")
        if "bos" in labels:
            raise RelpError(f"{raw.where}roles: 'bos' is the BOS token's own role; choose another name")
        return labels
    names = _named(raw, original, patch, offsets)
    labels_: list[str] = []
    anchor, since, within = "start", 0, 0
    for i, name in enumerate(names):
        if name is not None and i > 0 and names[i - 1] == name:
            within += 1
            labels_.append(f"{name}.{within}")
        elif name is not None:
            anchor, since, within = name, 0, 0
            labels_.append(name)
        else:
            since += labels_ != []
            labels_.append(f"{anchor}+{since}" if since else anchor)
    labels_[-1] = "end"
    used = ["bos", *labels_]
    if len(set(used)) < len(used):
        twice = next(label for label in used if used.count(label) > 1)
        raise RelpError(f"{raw.where}roles: two positions would be called '{twice}'; choose other names")
    return tuple(labels_)


def _named(
    raw: RawPair, original: tuple[int, ...], patch: tuple[int, ...] | None, offsets: Offsets
) -> list[str | None]:
    """The role that each token belongs to: its span's, or that of a run of differing tokens."""
    names: list[str | None] = [None] * len(original)
    for role, start, end in raw.pair.roles:
        mine = [i for i, token in enumerate(offsets) if names[i] is None and _touches(token, (start, end))]
        if not mine and raw.where:
            raise RelpError(f"{raw.where}roles: '{role}' [{start}, {end}] has no token of its own")
        for i in mine:
            names[i] = role
    if raw.pair.roles or patch is None:
        return names
    runs = 0
    for i, (x, y) in enumerate(zip(original, patch, strict=True)):
        if x != y:
            runs += i == 0 or names[i - 1] is None
            names[i] = "diff" if runs == 1 else f"diff{runs}"
    return names
