"""`load_task` and `Task`: from a task YAML or a pair file to batches of token ids for one model."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from relp_cli.errors import RelpError
from relp_cli.tasks.files import FILE_ENDINGS, assign_splits, read_pairs
from relp_cli.tasks.generate import check_split, generate, too_few
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.prompt import PromptPair, RawPair
from relp_cli.tasks.spec import TaskSpec, TaskText, content_hash, read_task
from relp_cli.tasks.tokenise import Encoder, TokenPair, tokenise, vocabulary


class HasTokenizer(Protocol):
    """What a task needs of a model: its name, a fast Hugging Face tokenizer or None, and the BOS id to prepend."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def bos(self) -> int | None: ...


@dataclass(frozen=True)
class Built:
    """Pairs for one model.

    batches:    one per (token length, roles).
    text_pairs: the same pairs as text, in the order of the batches' rows.
    dropped:    word list → (rows dropped, rows kept) by the model's tokenizer; for files `pairs` → the same.
    notes:      sentences that an output should carry.
    """

    batches: list[PairBatch]
    text_pairs: tuple[PromptPair, ...]
    dropped: dict[str, tuple[int, int]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task, independent of any model. `hash` covers the YAML with its includes, and the word lists or pair file."""

    name: str
    spec: TaskSpec
    metric: str
    hash: str
    text: TaskText
    fixed: tuple[RawPair, ...] = ()
    notes: tuple[str, ...] = ()

    def pairs(
        self,
        model: HasTokenizer,
        n: int | None = 100,
        seed: int = 0,
        split: str = "discovery",
        bos: bool | None = None,
    ) -> list[PairBatch]:
        """`n` pairs (None: all) as batches, one per (token length, roles). Same seed, same pairs.

        split: "discovery", "heldout" (disjoint from it), or "all". bos: None as the model says, True, False.
        Raises: RelpError on too few pairs, unequal token lengths, answers of several tokens, unknown words.
        """
        return self.build(model, n, seed, split, bos).batches

    def build(
        self,
        model: HasTokenizer,
        n: int | None = 100,
        seed: int = 0,
        split: str = "discovery",
        bos: bool | None = None,
    ) -> Built:
        """As `pairs`, with the texts and what the tokenizer dropped from the word lists."""
        check_split(split)
        if n is not None and n < 1:
            raise RelpError(f"expected at least one pair, got {n}")
        encoder = Encoder(model.tokenizer, model.name, _bos_id(model, bos))
        if self.fixed:
            raws, dropped, note = self._draw_fixed(encoder, n, seed, split)
        else:
            words = vocabulary(self.text, encoder)
            kept = {name: len(rows) for name, rows in words.rows.items()}
            dropped = {name: (len(full.rows) - kept[name], kept[name]) for name, full in self.text.lists.items()}
            lost = [f"{gone} of {gone + k} words of '{name}' dropped" for name, (gone, k) in dropped.items() if gone]
            note = f"{', '.join(lost)}: not single tokens of {model.name}" if lost else ""
            raws = generate(self.text, words, n, seed, split)
        groups: dict[tuple[str, ...], list[tuple[TokenPair, PromptPair]]] = {}
        for raw in raws:
            tokens = tokenise(raw, encoder)
            groups.setdefault(tokens.roles, []).append((tokens, raw.pair))
        ordered = sorted(groups.values(), key=lambda group: len(group[0][0].roles))
        return Built(
            [_batch([tokens for tokens, _ in group]) for group in ordered],
            tuple(pair for group in ordered for _, pair in group),
            dropped,
            (*self.notes, note) if note else self.notes,
        )

    def _draw_fixed(
        self, encoder: Encoder, n: int | None, seed: int, split: str
    ) -> tuple[list[RawPair], dict[str, tuple[int, int]], str]:
        """Pairs of the file, how many (did not fit the model, fit it), and a note on the former."""
        rows = [raw for raw in self.fixed if split in ("all", raw.split)]
        unusable: list[str] = []
        if self.spec.unusable == "drop":
            rows, unusable = _usable(rows, encoder)
        if not rows or (n is not None and n > len(rows)):
            raise too_few(self.name, n or 1, len(rows), split)
        drawn = random.Random(seed).sample(rows, len(rows) if n is None else n)
        note = (
            f"{len(unusable)} of {len(unusable) + len(rows)} pairs dropped, the first: {unusable[0]}"
            if unusable
            else ""
        )
        return drawn, {"pairs": (len(unusable), len(rows))}, note


def load_task(name_or_path: str | Path) -> Task:
    """A shipped task ("ioi"), a task YAML, or a file of pairs (.jsonl, .json, .csv).

    Raises: RelpError, one line `file:line: key: what was expected`; unknown names with the nearest shipped one.
    """
    path = Path(name_or_path)
    if path.suffix in FILE_ENDINGS:
        if not path.is_file():
            raise RelpError(f"{path}: no such file")
        raws, note = assign_splits(read_pairs(path))
        sets = any(len(ids) > 1 for raw in raws for ids in raw.outcome_ids or (raw.pair.answer, raw.pair.foil))
        spec = TaskSpec(name=path.stem, metric="prob_diff" if sets else "logit_diff", pairs=path.name)
        text = TaskText(spec, path, content_hash([path]))
        return Task(spec.name, spec, spec.metric, text.hash, text, tuple(raws), (note,))
    text = read_task(name_or_path)
    spec = text.spec
    if spec.pairs is None:
        return Task(spec.name, spec, spec.metric, text.hash, text)
    raws, note = assign_splits(read_pairs(text.path.parent / spec.pairs))
    if spec.join is not None:
        raws = [replace(raw, join=spec.join) for raw in raws]
    return Task(spec.name, spec, spec.metric, text.hash, text, tuple(raws), (note,))


def _usable(rows: list[RawPair], encoder: Encoder) -> tuple[list[RawPair], list[str]]:
    """The pairs that the model's tokenizer can take, and why each of the others cannot."""
    usable, reasons = [], []
    for raw in rows:
        try:
            tokenise(raw, encoder)
        except RelpError as error:
            reasons.append(str(error))
        else:
            usable.append(raw)
    return usable, reasons


def _bos_id(model: HasTokenizer, bos: bool | None) -> int | None:
    if bos is False:
        return None
    found = model.bos
    if bos and found is None:
        found = getattr(model.tokenizer, "bos_token_id", None)
        if found is None:
            raise RelpError(f"{model.name} has no BOS token to prepend")
    return found


def _batch(pairs: list[TokenPair]) -> PairBatch:
    patches = [pair.patch for pair in pairs if pair.patch is not None]
    if patches and len(patches) != len(pairs):
        raise RelpError("some of the pairs have a patch prompt and some have none")
    return PairBatch(
        original=torch.tensor([pair.original for pair in pairs]),
        patch=torch.tensor(patches) if patches else None,
        answer=_sets([pair.answer for pair in pairs]),
        foil=_sets([pair.foil for pair in pairs]),
        roles=pairs[0].roles,
    )


def _sets(rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Int[batch, k], filled with -1; a prompt without foil is a row of -1 only."""
    width = max([1, *map(len, rows)])
    return torch.tensor([list(row) + [-1] * (width - len(row)) for row in rows], dtype=torch.long)
