"""Training sentences: discovery-split prompts of the shipped tasks with their answers, and some filler grammar.

No held-out prompt is ever followed by one of its task's possible answers, in whatever sentence it occurs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache

from relp_cli.config.paths import data_root
from relp_cli.tasks.columns import WordSet
from relp_cli.tasks.generate import Vocabulary, content_of, generate, side
from relp_cli.tasks.spec import TaskText, list_tasks, read_task
from relp_cli.tasks.template import Mention, Template, parse
from relp_cli.tasks.words import Row, find_list, read_list

# Sentences per task: the ones whose rule must be inferred from many combinations get the most.
SHARES = {"ioi": 14000, "ioi_abba": 14000, "ioi_s2": 4000, "greater_than": 10000}
DEFAULT_SHARE = 7000
FEW_PAIRS = ("sva_simple", "greater_than")
FILLER_SHARE = 10000

# Slots are word lists; [N] and [M] are numbers drawn per sentence.
FILLER = (
    "{a=names} gave a {objects} to {b=names} .",
    "{a=names} and {b=names} went to the {places} .",
    "Then , {a=names} went to the {places} .",
    "The {a=people[N]} {verbs[N]} the {b=people[M]} .",
    "The {a=people[N]} {verbs[N]} {b=names} .",
    "This {people.sg} {auxiliaries.sg}",
    "These {people.pl} {auxiliaries.pl}",
    "The {people[N]} {auxiliaries[N]}",
    "The {things[N]} {auxiliaries[N]}",
    "{names} knows the {people[N]} {prepositions} the {things[M]} .",
    "The {people[N]} {prepositions} the {things[M]} {verbs[N]} {names} .",
    "So {names} felt {states} .",
)


@cache
def sentences(seed: int) -> tuple[str, ...]:
    """All training sentences, shuffled, drawn once in a process. Filler that would give away a held-out prompt is left out."""
    rng = random.Random(seed)
    tasks = [read_task(name) for name in list_tasks()]
    leaks = [_held_out_test(task) for task in tasks]
    texts = [text for task in tasks for text in _task_sentences(task, SHARES.get(task.spec.name, DEFAULT_SHARE), rng)]
    templates = [parse(text) for text in FILLER]
    texts += [_fill(rng.choice(templates), rng) for _ in range(FILLER_SHARE)]
    texts = [text for text in texts if not any(leak(text) for leak in leaks)]
    rng.shuffle(texts)
    return tuple(texts)


def _task_sentences(task: TaskText, count: int, rng: random.Random) -> list[str]:
    """Prompt, then one of its answers; pairs repeat (with answers drawn anew) where there are fewer than `count`."""
    vocabulary = Vocabulary({name: words.rows for name, words in task.lists.items()})
    n = None if task.spec.name in FEW_PAIRS else count
    pairs = [raw.pair for raw in generate(task, vocabulary, n, rng.randrange(2**32), "discovery")]
    join = " " if task.spec.join is None else task.spec.join
    chosen = [pairs[i % len(pairs)] for i in range(count)]
    return [f"{pair.original}{join}{rng.choice(pair.answer)}" for pair in chosen]


def _fill(template: Template, rng: random.Random) -> str:
    numbers = {"N": rng.choice(["sg", "pl"]), "M": rng.choice(["sg", "pl"])}
    text = ""
    for part in template.parts:
        if isinstance(part, Mention):
            column = numbers[part.index] if part.index else part.column
            text += rng.choice(_rows(part.slot)).form(column)
        else:
            text += part
    return text


@cache
def _rows(name: str) -> tuple[Row, ...]:
    return read_list(name, find_list(name, data_root("datasets"))).rows


def _held_out_test(task: TaskText) -> Callable[[str], bool]:
    """A test of whether a sentence begins with a held-out prompt of `task` and one of the task's possible answers."""
    forms: dict[str, dict[str, str]] = {}
    for slot, name in task.slot_lists.items():
        forms[slot] = {word: row.key for row in task.lists[name].rows for word in row.words}
    answers = set()
    for outcome in task.answer:
        if isinstance(outcome, WordSet):
            answers |= {row.key for row in task.lists[outcome.list].rows}
        else:
            answers |= set(forms[outcome.slot]) if outcome.slot else {outcome.role}
    ending = f"{re.escape(' ' if task.spec.join is None else task.spec.join)}(?:{_any(answers)})\\b"
    patterns = []
    for template in task.templates:
        mentions = template.mentions
        pattern = "".join(
            f"({_any(set(forms[part.slot]))})" if isinstance(part, Mention) else re.escape(part)
            for part in template.parts
        )
        patterns.append((re.compile(pattern + ending), mentions))

    def leaks(text: str) -> bool:
        for pattern, mentions in patterns:
            if match := pattern.match(text):
                keys = [forms[m.slot][word] for m, word in zip(mentions, match.groups(), strict=True)]
                if side(content_of(keys)) == "heldout":
                    return True
        return False

    return leaks


def _any(words: set[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=lambda word: (-len(word), word)))
