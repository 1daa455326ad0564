"""How a task fits a tokenizer, without its model: which words are several tokens, how many pairs there are, or why none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.tasks.counted import distinct, sharing_note
from relp_cli.tasks.encoder import Encoder
from relp_cli.tasks.generate import AtMost
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.shared import prompts_of
from relp_cli.tasks.task import Task
from relp_cli.tasks.tokenise import vocabulary

MOST = AtMost(100)  # pairs that are drawn per split


@dataclass(frozen=True)
class Bare:
    """A tokenizer in a model's place. Whether a BOS token goes before prompts is the model's to say, and changes no count."""

    name: str
    tokenizer: Any
    bos: int | None = None
    bos_asked: bool = False


@dataclass(frozen=True)
class Fit:
    """several: word list → word → its tokens, of words that the task cannot use.
    pairs:   split → how many were drawn, at most `MOST`. prompts: of how many original prompts. lengths: token length → how
             many of these.
    why:     what is wrong, in one line a problem; an unusable task has no pairs.
    """

    several: dict[str, dict[str, str]]
    pairs: dict[str, int]
    prompts: dict[str, int]
    lengths: dict[int, int]
    why: tuple[str, ...]


def fit(task: Task, bare: Bare) -> Fit:
    """Tokenise the task's words and draw pairs of both splits. Problems are collected, not raised."""
    encoder = Encoder(bare.tokenizer, bare.name, None)
    several: dict[str, dict[str, str]] = {}
    why, pairs, prompts, lengths = list[str](), dict[str, int](), dict[str, int](), dict[int, int]()
    try:
        for name, kept in vocabulary(task.text, encoder, METRICS[task.metric].several).rows.items():
            usable = {row.key for row in kept}
            lost = [row.key for row in task.text.lists[name].rows if row.key not in usable]
            if lost:
                several[name] = {word: encoder.pieces(encoder.encode(" " + word)[0]) for word in lost}
    except RelpError as error:
        return Fit(several, pairs, prompts, lengths, (str(error),))
    for split in ("discovery", "heldout"):
        try:
            built = task.build(bare, MOST, 0, split)
        except RelpError as error:
            pairs[split] = prompts[split] = 0
            if str(error) not in why:
                why.append(str(error))
            continue
        of = prompts_of(built.batches)
        pairs[split], prompts[split] = len(of), distinct(of)
        if said := sharing_note(of):
            why.append(f"{split}: {said.removeprefix('WARNING: ')}")
        why += [said for said in map(_warning, built.notes) if said and said not in why]
        for batch in built.batches:
            lengths[batch.n_pos] = lengths.get(batch.n_pos, 0) + len(batch)
    return Fit(several, pairs, prompts, dict(sorted(lengths.items())), tuple(why))


def _warning(note: str) -> str:
    start, _, text = note.partition("WARNING: ")
    return "" if start else text
