"""Word combinations → pairs of texts. Pure text: no tokenizer, no torch.

The split is a property of a *prompt*: the unordered set of words it shows is hashed, so that the same words in other
roles or another template fall on the same side, and a pair exists in a split only if both its prompts do. No prompt
of one split therefore occurs in the other, as an original or as a patch, whatever n and seed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from relp_cli.errors import RelpError, nearest
from relp_cli.tasks.columns import WordSet
from relp_cli.tasks.prompt import PromptPair, RawPair
from relp_cli.tasks.spec import TaskText
from relp_cli.tasks.template import Mention, Template, Text
from relp_cli.tasks.words import Row

DISCOVERY_SHARE = 0.75
SPLITS = ("discovery", "heldout", "all")
_TRIES = 300
_RINGS = 200
_MAX_ALL = 500_000
_MAX_STRATA = 256
_MAX_WHY = 20_000
SAME_ANSWER = "have the same answer to the patch prompt as to the original (name a foil)"


def check_split(split: str) -> None:
    """Raises: RelpError on an unknown split, with the nearest one."""
    if split not in SPLITS:
        raise RelpError(f"unknown split '{split}'{nearest(split, SPLITS)}")


def content_of(words: Iterable[str]) -> str:
    """What a prompt's split is decided by: its words (by their rows' keys) in any order."""
    return "|".join(sorted(set(words)))


def side(content: str) -> str:
    """The split that a piece of content belongs to, by its hash alone."""
    return "discovery" if digest(content) < DISCOVERY_SHARE * 2**64 else "heldout"


def digest(content: str) -> int:
    """A number from 0 to 2⁶⁴ − 1 that a piece of content always has."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


class AtMost(int):
    """A number of pairs that is not asked for: where there are fewer, these are taken. A plain int is asked for."""


class TooFewPairs(RelpError):
    """More pairs were asked than exist; `count` do."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


def too_few(name: str, n: int, count: int, split: str, why: str = "") -> TooFewPairs:
    """The error for asking more pairs than exist."""
    about = f"task '{name}' has {count} pairs in split '{split}' for this model, {n} were asked"
    return TooFewPairs(about + (f": {why}" if why else ""), count)


@dataclass(frozen=True)
class Vocabulary:
    """What of a task's words a model can use.

    rows:    list name → usable rows. Answer sets keep these words only.
    accepts: whether a rendered prompt keeps glued slots apart ("17" + "32" may be one token, "1732").
    """

    rows: Mapping[str, Sequence[Row]]
    accepts: Callable[[Text], bool] = lambda _: True


def generate(task: TaskText, vocabulary: Vocabulary, n: int | None, seed: int, split: str) -> list[RawPair]:
    """`n` distinct pairs (None: all) of usable words; same seed, same pairs.

    Raises: RelpError when fewer than `n` pairs exist in the split (says how many), or for all pairs of a huge task.
    """
    check_split(split)
    pool = _Pool(task, vocabulary, split)
    if n is None and pool.size > _MAX_ALL:
        raise RelpError(f"task '{task.spec.name}' has about {pool.size} combinations of words: give a number of pairs")
    rng = random.Random(seed)
    if n is None or n > pool.size // 4:
        everything = list(pool.everything())
        if n is None or n == len(everything):
            rng.shuffle(everything)
            return everything
        if n > len(everything):
            raise too_few(task.spec.name, n, len(everything), split, "" if everything else pool.why_none())
    found = pool.balanced(n, rng) if task.spec.balance else pool.sample(n, rng)
    rng.shuffle(found)
    return found


@dataclass(frozen=True)
class _Choice:
    """Template and inline values of a pair: what is cycled through, so that each occurs equally often.

    changes: which of the template's mentions the pairing rule may change.
    """

    template: Template
    words: tuple[tuple[str, Row], ...]
    changes: tuple[int, ...]


class _Pool:
    """All pairs of a task in a split, given the usable rows of its lists."""

    def __init__(self, task: TaskText, vocabulary: Vocabulary, split: str) -> None:
        self.task, self.split, self.accepts, rows = task, split, vocabulary.accepts, vocabulary.rows
        self.usable = {name: {row.key for row in kept} for name, kept in rows.items()}
        self.rows = {slot: tuple(rows[name]) for slot, name in task.slot_lists.items()}
        self.orders = {name: [row.key for row in words.rows] for name, words in task.lists.items()}
        self.role_patch, self.slot_patch = task.role_patch, task.slot_patch
        self.sharing = [
            slots
            for name in dict.fromkeys(task.slot_lists.values())
            if len(slots := [slot for slot, its in task.slot_lists.items() if its == name]) > 1
        ]
        inline = [slot for slot in self.rows if task.spec.slots[slot.removesuffix("~")].values is not None]
        if len(task.templates) * math.prod(len(self.rows[slot]) for slot in inline) > _MAX_STRATA:
            inline = []
        self.drawn = [slot for slot in self.rows if slot not in inline]
        self.choices = [
            _Choice(
                template,
                tuple(zip(inline, words, strict=True)),
                tuple(i for i, mention in enumerate(template.mentions) if task.changes(mention)),
            )
            for template in task.templates
            for words in itertools.product(*(self.rows[slot] for slot in inline))
            if self._distinct(dict(zip(inline, words, strict=True)))
        ]
        self.size = len(self.choices) * math.prod(len(self.rows[slot]) for slot in self.drawn)

    def _distinct(self, words: Mapping[str, Row]) -> bool:
        """Slots that draw on the same list show different words."""
        for slots in self.sharing:
            used = [words[slot].key for slot in slots if slot in words]
            if len(set(used)) < len(used):
                return False
        return True

    def everything(self) -> Iterator[RawPair]:
        """Every pair of the split, once."""
        seen = set()
        for choice in self.choices:
            for rows in itertools.product(*(self.rows[slot] for slot in self.drawn)):
                raw = self.pair(choice, dict(zip(self.drawn, rows, strict=True)))
                if raw is not None and raw.pair not in seen:
                    seen.add(raw.pair)
                    yield raw

    def sample(self, n: int, rng: random.Random) -> list[RawPair]:
        """`n` pairs, templates and inline values as equally often as the combinations allow."""
        found: dict[PromptPair, RawPair] = {}
        for i, choice in enumerate(self._cycle(n, rng)):
            raw = self._draw(choice, {}, found, rng)
            if raw is None:
                rest = [raw for raw in self.everything() if raw.pair not in found]
                if len(rest) < n - i:
                    why = "" if rest or i else self.why_none()
                    raise too_few(self.task.spec.name, n, len(rest) + i, self.split, why)
                return [*found.values(), *rng.sample(rest, n - i)]
            found[raw.pair] = raw
        return list(found.values())

    def balanced(self, n: int, rng: random.Random) -> list[RawPair]:
        """`n` pairs in which each word occurs equally often in each of the balanced slots."""
        slots, words = self.task.spec.balance, len(self.rows[self.task.spec.balance[0]])
        sizes = [words] * (n // words) + [n % words] * (n % words > 0)
        if len(sizes) > 1 and sizes[-1] < len(slots):  # a ring needs at least as many words as slots
            sizes[-2:] = [sizes[-2] - len(slots), sizes[-1] + len(slots)]
        found: dict[PromptPair, RawPair] = {}
        choices = list(self._cycle(n, rng))
        for size in sizes:
            rings = (self._ring(choices[len(found) : len(found) + size], found, rng) for _ in range(_RINGS))
            ring = next((ring for ring in rings if ring is not None), None)
            if ring is None:
                break
            found |= ring
        else:
            return list(found.values())
        count = sum(1 for _ in self.everything())
        if n > count:
            raise too_few(self.task.spec.name, n, count, self.split, "" if count else self.why_none())
        raise RelpError(
            f"task '{self.task.spec.name}': no {n} of the {count} pairs in split '{self.split}' were found that use "
            f"each word equally often in {', '.join(slots)}; ask fewer, or all {count}"
        )

    def _ring(
        self, choices: Sequence[_Choice], found: dict[PromptPair, RawPair], rng: random.Random
    ) -> dict[PromptPair, RawPair] | None:
        """One pair per choice, from a shuffled ring of as many words: balanced slot j of pair i takes word i + j.

        None where a pair of neighbours has no combination left.
        """
        slots = self.task.spec.balance
        rows = self.rows[slots[0]]
        ring = rng.sample(rows, max(len(choices), min(len(slots), len(rows))))
        new: dict[PromptPair, RawPair] = {}
        for i, choice in enumerate(choices):
            fixed = {slot: ring[(i + j) % len(ring)] for j, slot in enumerate(slots)}
            raw = self._draw(choice, fixed, ChainMap(new, found), rng)
            if raw is None:
                return None
            new[raw.pair] = raw
        return new

    def _cycle(self, n: int, rng: random.Random) -> Iterator[_Choice]:
        for start in range(0, n, len(self.choices)):
            yield from rng.sample(self.choices, len(self.choices))[: n - start]

    def _draw(
        self, choice: _Choice, fixed: Mapping[str, Row], found: Mapping[PromptPair, RawPair], rng: random.Random
    ) -> RawPair | None:
        free = [slot for slot in self.drawn if slot not in fixed]
        for _ in range(_TRIES):
            raw = self.pair(choice, {**fixed, **{slot: rng.choice(self.rows[slot]) for slot in free}})
            if raw is not None and raw.pair not in found:
                return raw
        return None

    def why_none(self) -> str:
        """Why no combination of words is a pair: how many fail for which reason, of the first `_MAX_WHY`."""
        combinations = (
            (choice, dict(zip(self.drawn, rows, strict=True)))
            for choice in self.choices
            for rows in itertools.product(*(self.rows[slot] for slot in self.drawn))
        )
        made = [self.pair_or_why(*one) for one in itertools.islice(combinations, _MAX_WHY)]
        if not made:
            return "slots that share a list need at least as many words as there are slots"
        counts = Counter(why for why in made if isinstance(why, str)).most_common()
        first = "" if len(made) < _MAX_WHY else "the first "
        return f"of {first}{len(made)} combinations of words " + ", ".join(f"{n} {why}" for why, n in counts)

    def pair(self, choice: _Choice, drawn: Mapping[str, Row]) -> RawPair | None:
        """The pair of a combination, or None where it is none: words that must differ do not, or another split."""
        made = self.pair_or_why(choice, drawn)
        return None if isinstance(made, str) else made

    def pair_or_why(self, choice: _Choice, drawn: Mapping[str, Row]) -> RawPair | str:
        """The pair of a combination, or why it is none."""
        words = {**dict(choice.words), **drawn}
        if not self._distinct(words):
            return "show one word in two slots of a list"
        task, mentions = self.task, choice.template.mentions
        patched = {**words, **{slot: words[source] for slot, source in self.slot_patch.items()}}
        if self.split != "all":  # before anything is rendered: half of what is drawn ends here
            if side(_shown(mentions, words, {})) != self.split:
                return "are of the other split"
            if task.patch and side(_shown(mentions, patched, self.role_patch)) != self.split:
                return "have a patch prompt of the other split"
        original, patch = choice.template.render(words), choice.template.render(patched, self.role_patch)
        if not (self.accepts(original) and self.accepts(patch)):
            return "have words that touch and are no tokens of their own"
        answer = self._outcomes(task.answer, words)
        foil = self._outcomes(task.foil, words)
        if task.patch and not task.foil:
            foil = self._outcomes(task.answer, patched)
        if not answer:
            return "have no answer"
        if set(answer) & set(foil):
            return "have a foil that equals the answer" if task.foil else SAME_ANSWER
        if task.patch and original.text == patch.text:
            return "have a patch prompt that equals the original"
        if task.patch and not foil:
            return "have no foil"
        changed = tuple((original.spans[i][1:], patch.spans[i][1:]) for i in choice.changes)
        roles = tuple((mention.role, start, end) for mention, start, end in original.spans)
        text = PromptPair(original.text, patch.text if task.patch else None, answer, foil, roles)
        return RawPair(text, changed, task.spec.join)

    def _outcomes(self, outcomes: Sequence[Mention | WordSet], words: Mapping[str, Row]) -> tuple[str, ...]:
        texts: list[str] = []
        for outcome in outcomes:
            if isinstance(outcome, Mention):
                texts.append(outcome.word(words) if outcome.slot else outcome.role)
                continue
            order = self.orders[outcome.list]
            word = words[outcome.slot].key
            if word not in order:
                raise RelpError(f"task '{self.task.spec.name}': '{word}' is not in the ordered list '{outcome.list}'")
            place = order.index(word) + 1
            chosen = order[place:] if outcome.after else order[:place]
            texts += [word for word in chosen if word in self.usable[outcome.list]]
        return tuple(texts)


def _shown(mentions: Iterable[Mention], words: Mapping[str, Row], roles: Mapping[str, str]) -> str:
    """The content of a prompt of these mentions, whatever forms its words have."""
    return content_of(words[roles.get(mention.role, mention.slot)].key for mention in mentions)
