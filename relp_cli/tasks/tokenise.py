"""Text pairs → token ids of equal length, with a role per position. Never padding, never truncation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.tasks.generate import Vocabulary
from relp_cli.tasks.prompt import RawPair
from relp_cli.tasks.spec import TaskText, WordSet
from relp_cli.tasks.template import Mention, Template, Text
from relp_cli.tasks.words import Row

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class TokenPair:
    """One pair as token ids, BOS included: `original` and `patch` of one length, a role per position."""

    original: tuple[int, ...]
    patch: tuple[int, ...] | None
    answer: tuple[int, ...]
    foil: tuple[int, ...]
    roles: tuple[str, ...]


class Encoder:
    """A fast Hugging Face tokenizer used without its special tokens; BOS (an id or None) is prepended here."""

    def __init__(self, tokenizer: Any, model_name: str, bos: int | None) -> None:
        if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
            raise RelpError(f"the tokenizer of {model_name} gives no character offsets (not a fast tokenizer)")
        self.tokenizer, self.name, self.bos = tokenizer, model_name, bos
        self._outcomes: dict[tuple[str, str], tuple[int, ...]] = {}
        self._singles: dict[tuple[str, str, str], bool] = {}

    @cached_property
    def unk(self) -> int | None:
        """The id that stands for unknown text; None for tokenizers that can spell everything."""
        unk = self.tokenizer.unk_token_id
        # Byte-level tokenizers name an ordinary special token (GPT-2: end of text) that text never produces.
        return None if unk is None or unk == self.tokenizer.eos_token_id else int(unk)

    def encode(self, text: str) -> tuple[tuple[int, ...], Offsets]:
        """Token ids of the text and their character spans, unknown tokens included."""
        if self.tokenizer is None:
            raise RelpError(f"{self.name} has no tokenizer: only pairs of token ids can be used with it")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return tuple(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]

    def pieces(self, ids: Sequence[int]) -> str:
        """The tokens, made visible: `The| athlete`."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        texts = [self.tokenizer.decode([i]) for i in ids]
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        return "|".join(n if str(n)[:1] in "▁Ġ<[" else t for t, n in zip(texts, names, strict=True)).replace("Ġ", " ")

    def known(self, text: str, where: str) -> tuple[tuple[int, ...], Offsets]:
        """As `encode`. Raises: RelpError naming the words that the model's vocabulary lacks."""
        ids, offsets = self.encode(text)
        missing = [text[s:e] for i, (s, e) in zip(ids, offsets, strict=True) if i == self.unk]
        if missing:
            words = ", ".join(dict.fromkeys(missing))
            raise RelpError(f"{where}'{text}': not in the vocabulary of {self.name}: {words}")
        if not ids:
            raise RelpError(f"{where}an empty prompt")
        return ids, offsets

    def single(self, left: str, word: str, right: str) -> bool:
        """Whether `word` is exactly one known token (a leading space may belong to it) between left and right."""
        key = (left, word, right)
        if key not in self._singles:
            ids, offsets = self.encode(left + word + right)
            start, end = len(left), len(left) + len(word)
            inside = [(i, s, e) for i, (s, e) in zip(ids, offsets, strict=True) if s < end and e > start]
            self._singles[key] = (
                len(inside) == 1
                and inside[0][0] != self.unk
                and inside[0][2] == end
                and (inside[0][1] == start or (inside[0][1] == start - 1 and left[-1].isspace()))
            )
        return self._singles[key]

    def outcome(self, prompt: str, answer: str, join: str | None) -> tuple[int, ...]:
        """Token ids of `answer` where it follows `prompt` (one id when it is a single token)."""
        if join is None:
            join = " " if answer[:1].isalpha() and prompt and not prompt[-1].isspace() else ""
        context = prompt[len(prompt.rstrip()) - len((prompt.split() or [""])[-1]) :]
        key = (context, join + answer)
        if key not in self._outcomes:
            before, _ = self.encode(context)
            ids, _ = self.encode(context + join + answer)
            if ids[: len(before)] == before and len(ids) == len(before) + 1:
                found = ids[len(before) :]
            else:  # the answer merges with the prompt's last word ("17" + "76"): as generated, token by token
                found, _ = self.encode(join + answer)
            self._outcomes[key] = found
        return self._outcomes[key]

    def outcome_id(self, prompt: str, answer: str, join: str | None, where: str) -> int:
        """The single token of an answer. Raises: RelpError that shows the pieces otherwise."""
        ids = self.outcome(prompt, answer, join)
        if len(ids) != 1 or ids[0] == self.unk:
            pieces = self.pieces(ids) or "nothing"
            raise RelpError(f"{where}answer '{answer}' is not a single token of {self.name}: {pieces}")
        return ids[0]


def vocabulary(task: TaskText, encoder: Encoder) -> Vocabulary:
    """The rows whose words are single tokens wherever the task needs that, and a check of slots that touch.

    Raises: RelpError naming list and model where no row is left.
    """
    kept: dict[str, tuple[Row, ...]] = {}
    for name, words in task.lists.items():
        contexts, endings = _contexts(task, name), _endings(task, name)
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
    ids = encoder.outcome(prompt, word, task.spec.join)
    return len(ids) == 1 and ids[0] != encoder.unk


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


def tokenise(raw: RawPair, encoder: Encoder) -> TokenPair:
    """One pair as token ids.

    Raises: RelpError where the prompts' token lengths differ, where they differ outside the spans that the pairing
    rule changes (both show the two tokenisations), on unknown tokens, and on answers of several tokens.
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
    else:
        answer, foil = (
            tuple(encoder.outcome_id(pair.original, text, raw.join, where) for text in texts)
            for texts in (pair.answer, pair.foil)
        )
    if set(answer) & set(foil):
        raise RelpError(f"{where}answer and foil share the token {encoder.pieces(sorted(set(answer) & set(foil))[:1])}")
    bos = () if encoder.bos is None else (encoder.bos,)
    roles = _labels(raw, original, patch, offsets)
    return TokenPair(bos + original, None if patch is None else bos + patch, answer, foil, ("bos",) * len(bos) + roles)


def _check_aligned(
    raw: RawPair, encoder: Encoder, one: tuple[tuple[int, ...], Offsets], two: tuple[tuple[int, ...], Offsets]
) -> None:
    (a, a_spans), (b, b_spans) = one, two
    shown = f"original {encoder.pieces(a)} ({len(a)}) / patch {encoder.pieces(b)} ({len(b)})"
    if len(a) != len(b):
        hint = "; `unusable: drop` in a task YAML leaves such pairs of a file out" if raw.where else ""
        raise RelpError(f"{raw.where}original and patch have different token lengths: {shown}{hint}")
    if a == b:
        raise RelpError(f"{raw.where}original and patch are the same tokens: {encoder.pieces(a)}")
    if raw.changed is None:
        return
    for x, y, x_span, y_span in zip(a, b, a_spans, b_spans, strict=True):
        if x != y and not any(_touches(x_span, old) and _touches(y_span, new) for old, new in raw.changed):
            raise RelpError(f"{raw.where}original and patch differ where the pairing rule changes nothing: {shown}")


def _touches(token: tuple[int, int], span: tuple[int, int]) -> bool:
    return token[0] < span[1] and token[1] > span[0]


def _labels(
    raw: RawPair, original: tuple[int, ...], patch: tuple[int, ...] | None, offsets: Offsets
) -> tuple[str, ...]:
    """One label per token (BOS apart). A span's tokens are `S1`, `S1.1`, ...; others count from the anchor before
    them (`S1+1`); the first anchor is `start`, the last token is always `end`.

    A file without roles is anchored where original and patch differ: `diff`, `diff2`, ...
    """
    if raw.labels is not None:
        if len(raw.labels) != len(original):
            raise RelpError(f"{raw.where}{len(raw.labels)} roles for {len(original)} tokens (BOS is not counted)")
        return raw.labels
    spans: list[str | None] = [None] * len(original)
    if raw.pair.roles:
        for role, start, end in raw.pair.roles:
            for i, token in enumerate(offsets):
                if spans[i] is None and _touches(token, (start, end)):
                    spans[i] = role
    elif patch is not None:
        runs = 0
        for i, (x, y) in enumerate(zip(original, patch, strict=True)):
            if x != y:
                runs += i == 0 or spans[i - 1] is None
                spans[i] = "diff" if runs == 1 else f"diff{runs}"
    labels: list[str] = []
    anchor, since, within = "start", 0, 0
    for i, span in enumerate(spans):
        if span is not None and i > 0 and spans[i - 1] == span:
            within += 1
            labels.append(f"{span}.{within}")
        elif span is not None:
            anchor, since, within = span, 0, 0
            labels.append(span)
        else:
            since += labels != []
            labels.append(f"{anchor}+{since}" if since else anchor)
    return (*labels[:-1], "end")
