"""`load_task` and `Task`: from a task YAML or a pair file to batches of token ids for one model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from relp_cli.errors import RelpError
from relp_cli.tasks.bos import Bos, HasTokenizer, choose_bos
from relp_cli.tasks.counted import pairs_text
from relp_cli.tasks.encoder import Encoder
from relp_cli.tasks.foreign import Foreign
from relp_cli.tasks.generate import AtMost, TooFewPairs, check_split, generate, too_few
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.prompt import PromptPair, RawPair
from relp_cli.tasks.source import TaskSource, read_source
from relp_cli.tasks.spec import TaskSpec, TaskText
from relp_cli.tasks.tokenise import TokenPair, tokenise, vocabulary

T = TypeVar("T")
PAIRS = AtMost(100)
LONG = 4  # tokens of prompts that are asked whether they are aligned; shorter ones differ in most of theirs by design


@dataclass(frozen=True)
class Built:
    """Pairs for one model.

    batches:    one per (token length, roles).
    text_pairs: the same pairs as text, in the order of the batches' rows.
    dropped:    word list → (rows dropped, rows kept) by the model's tokenizer; for files `pairs` → the same.
    bos:        which BOS token the prompts start with, and who decided.
    notes:      sentences that an output should carry, the one on BOS among them.
    """

    batches: list[PairBatch]
    text_pairs: tuple[PromptPair, ...]
    dropped: dict[str, tuple[int, int]]
    bos: str
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
        n: int | None = PAIRS,
        seed: int = 0,
        split: str = "discovery",
        bos: bool | None = None,
        unusable: str | None = None,
        metric: str | None = None,
    ) -> list[PairBatch]:
        """`n` pairs (None: all) as batches, one per (token length, roles). Same seed, same pairs. Where `n` is not given: 100, or
        as many as there are.

        split: "discovery", "heldout" (disjoint from it), or "all". bos: prepend BOS or not; None: the
        model's own (TransformerLens's default, unless it was loaded with another). Prompts that start with BOS get no other.
        unusable: "error" or "drop" pairs of a file that do not fit the model; None: as the task says. metric: what they will be
        scored by (None: the task's): answer_logprob takes answers of several tokens.
        Raises: RelpError on too few pairs, unequal token lengths, answers of several tokens, unknown words.
        """
        return self.build(model, n, seed, split, bos, unusable, metric).batches

    def with_ids_of(self, name: str | None) -> Task:
        """The task whose file holds token ids of that model (None: of the one that it names itself).

        Raises: RelpError where the file holds none, or the task names another model.
        """
        if name is None or name == self.spec.ids_of:
            return self
        if not any(_has_ids(raw) for raw in self.fixed):
            raise RelpError(f"--ids-of {name}: task '{self.name}' holds no token ids")
        if self.spec.ids_of is not None:
            raise RelpError(
                f"--ids-of {name}: task '{self.name}' says that its token ids are those of {self.spec.ids_of}"
            )
        return replace(self, spec=self.spec.model_copy(update={"ids_of": name}))

    def foreign(self) -> Foreign | None:
        """The tokenizer that the file's ids belong to. Raises: RelpError where it cannot be loaded."""
        return None if self.spec.ids_of is None else Foreign(self.spec.ids_of, self.text.path.parent)

    def build(
        self,
        model: HasTokenizer,
        n: int | None = PAIRS,
        seed: int = 0,
        split: str = "discovery",
        bos: bool | None = None,
        unusable: str | None = None,
        metric: str | None = None,
    ) -> Built:
        """As `pairs`, with the texts and what the tokenizer dropped from the word lists."""
        if not hasattr(model, "tokenizer"):
            raise RelpError(f"expected a model that relp.load_model returned, got a {type(model).__name__}")
        check_split(split)
        if n is not None and n < 1:
            raise RelpError(f"expected at least one pair, got {n}")
        if isinstance(n, AtMost):
            try:
                return self.build(model, int(n), seed, split, bos, unusable, metric)
            except TooFewPairs as error:
                if not error.count:
                    raise
                of = "pairs" if split == "all" else f"{split} pairs"
                note = f"{pairs_text(error.count, None, of, ('exists', 'exist'))}, {n} were asked"
                fewer = self.build(model, error.count, seed, split, bos, unusable, metric)
                return replace(fewer, notes=(*fewer.notes, note))
        chosen = choose_bos(model, bos)
        encoder = Encoder(model.tokenizer, model.name, chosen.id)
        several = METRICS[metric or self.metric].several
        if self.fixed:
            raws, dropped, note = self._draw_fixed(encoder, n, seed, split, unusable or self.spec.unusable, several)
        else:
            words = vocabulary(self.text, encoder, several)
            kept = {name: len(rows) for name, rows in words.rows.items()}
            dropped = {name: (len(full.rows) - kept[name], kept[name]) for name, full in self.text.lists.items()}
            lost = [f"{gone} of {gone + k} words of '{name}' dropped" for name, (gone, k) in dropped.items() if gone]
            note = f"{', '.join(lost)}: not single tokens of {model.name}" if lost else ""
            raws = generate(self.text, words, n, seed, split)
        tokenised = [(_tried(lambda raw: tokenise(raw, encoder, several), raw), raw) for raw in raws]
        ordered = grouped([(tokens, raw.pair) for tokens, raw in tokenised])
        everything = [tokens for group in ordered for tokens, _ in group]
        about = _about_bos(chosen, everything)
        notes = [
            *self.notes,
            f"BOS: {about}",
            note,
            _merged(encoder),
            _left_out(encoder),
            self._about_ids(encoder, raws),
        ]
        notes += [_repeated(everything, encoder.name), _apart(tokenised)]
        return Built(
            [batch_of([tokens for tokens, _ in group]) for group in ordered],
            tuple(pair for group in ordered for _, pair in group),
            dropped,
            about,
            tuple(note for note in notes if note),
        )

    def _draw_fixed(
        self, encoder: Encoder, n: int | None, seed: int, split: str, unusable: str, several: bool
    ) -> tuple[list[RawPair], dict[str, tuple[int, int]], str]:
        """Pairs of the file, how many (did not fit the model, fit it), and a note on the former."""
        rows = [raw for raw in self.fixed if split in ("all", raw.split)]
        reasons: list[str] = []
        foreign = self.foreign()
        if unusable == "drop":
            rows, reasons = _usable(rows, encoder, foreign, several)
        if not rows and reasons:
            raise TooFewPairs(
                f"task '{self.name}': none of {len(reasons)} pairs fits {encoder.name}, the first: {reasons[0]}", 0
            )
        if not rows or (n is not None and n > len(rows)):
            raise too_few(self.name, n or 1, len(rows), split)
        drawn = random.Random(seed).sample(rows, len(rows) if n is None else n)
        if foreign is not None:
            drawn = [_tried(lambda raw: foreign.as_text(raw, encoder), raw) for raw in drawn]
        note = f"{len(reasons)} of {len(reasons) + len(rows)} pairs dropped, the first: {reasons[0]}" if reasons else ""
        return drawn, {"pairs": (len(reasons), len(rows))}, note

    def _about_ids(self, encoder: Encoder, raws: list[RawPair]) -> str:
        """A note on whose token ids a file holds."""
        if self.spec.ids_of is not None:
            how = (
                "as they are: the vocabularies are the same"
                if any(_has_ids(raw) for raw in raws)
                else "through their text"
            )
            return f"token ids of {self.spec.ids_of}, taken for {encoder.name} {how}"
        told = next((raw for raw in raws if raw.outcome_ids is not None and raw.ids is None), None)
        if told is None or told.outcome_ids is None or encoder.tokenizer is None:
            return ""
        shown = ", ".join(f"{ids[0]} is {encoder.pieces(ids[:1])!r}" for ids in told.outcome_ids if ids)
        return (
            f"WARNING: the file's token ids are taken as {encoder.name}'s own ({shown}); of another tokenizer they are wrong: "
            "say whose they are with `ids_of: MODEL` in a task YAML, or --ids-of MODEL"
        )


def load_task(name_or_path: str | Path) -> Task:
    """A shipped task ("ioi"), a task YAML, or a file of pairs (.jsonl, .json, .csv, .parquet).

    Raises: RelpError, one line `file:line: key: what was expected`; unknown names with the nearest shipped one.
    """
    if not isinstance(name_or_path, str | Path):
        raise RelpError(f"load_task: expected a task's name or a path, got a {type(name_or_path).__name__}")
    return task_of(read_source(name_or_path))


def task_of(source: TaskSource) -> Task:
    """The task of a source that is read."""
    spec = source.text.spec
    return Task(spec.name, spec, spec.metric, source.text.hash, source.text, source.fixed, source.notes)


def _usable(
    rows: list[RawPair], encoder: Encoder, foreign: Foreign | None, several: bool
) -> tuple[list[RawPair], list[str]]:
    """The pairs that the model's tokenizer can take, and why each of the others cannot."""
    usable, reasons = [], []
    for raw in rows:
        try:
            tokenise(raw if foreign is None else foreign.as_text(raw, encoder), encoder, several)
        except RelpError as error:
            reasons.append(str(error))
        else:
            usable.append(raw)
    return usable, reasons


def _tried(what: Callable[[RawPair], T], raw: RawPair) -> T:
    """What it makes of a pair; its refusal of a file's pair says how to go on without."""
    try:
        return what(raw)
    except RelpError as error:
        hint = "; `--unusable drop` leaves such pairs of a file out" if raw.where else ""
        raise RelpError(f"{error}{hint}") from None


def _has_ids(raw: RawPair) -> bool:
    return raw.ids is not None or raw.outcome_ids is not None


def _about_bos(chosen: Bos, pairs: list[TokenPair]) -> str:
    count = sum(pair.written for pair in pairs)
    if not count:
        return chosen.about
    return f"{chosen.about}; {count} of {len(pairs)} pairs start with it as given, and get no other"


def _merged(encoder: Encoder) -> str:
    """A note on answers that are no tokens of their own in the joined text."""
    if not encoder.merged:
        return ""
    how = next(iter(encoder.merged.values()))
    return (
        f"{len(encoder.merged)} answers merge with the prompt's last word ({how}, the first); their own tokens are read, as "
        "a model that writes token by token would go on"
    )


def _left_out(encoder: Encoder) -> str:
    """A note on listed answers that the model has no token for."""
    if not encoder.left_out:
        return ""
    return (
        f"{len(encoder.left_out)} of {len(encoder.words)} listed answers are no single tokens of {encoder.name} and are left "
        f"out ('{min(encoder.left_out)}', …)"
    )


def _apart(pairs: Sequence[tuple[TokenPair, RawPair]]) -> str:
    """A warning of pairs of a file whose prompts differ in more than half of their tokens, as they do where one is shifted."""
    said = []
    for tokens, raw in pairs:
        if not raw.where or tokens.patch is None:
            continue
        n = len(tokens.roles) - tokens.roles.count("bos")
        differ = sum(a != b for a, b in zip(tokens.original, tokens.patch, strict=True))
        if 2 * differ > n and n >= LONG:
            said.append(f"{raw.where}{differ} of {n} tokens differ")
    more = f" (and {pairs_text(len(said) - 1, what='more pairs')} like it)" if len(said) > 1 else ""
    return f"WARNING: {said[0]}{more}: are the prompts aligned?" if said else ""


def _repeated(pairs: list[TokenPair], name: str) -> str:
    """A note on texts that differ while their tokens do not."""
    extra = len(pairs) - len({(pair.original, pair.patch, pair.answer, pair.foil) for pair in pairs})
    return (
        f"WARNING: {extra} of {len(pairs)} pairs are the tokens of another pair for {name}: n is too large"
        if extra
        else ""
    )


def grouped(pairs: list[tuple[TokenPair, T]]) -> list[list[tuple[TokenPair, T]]]:
    """Pairs that go into one batch each, the shorter first. Where every answer is one token, none is taken as a sequence."""
    if all(len(tokens.answer) == 1 and len(tokens.foil) <= 1 for tokens, _ in pairs):
        pairs = [(replace(tokens, several=False), more) for tokens, more in pairs]
    groups: dict[tuple[object, ...], list[tuple[TokenPair, T]]] = {}
    for tokens, more in pairs:
        groups.setdefault(tokens.group, []).append((tokens, more))
    return sorted(groups.values(), key=lambda group: len(group[0][0].roles))


def batch_of(pairs: list[TokenPair]) -> PairBatch:
    """Pairs of the same roles as one batch. Raises RelpError where only some have a patch prompt."""
    patches = [pair.patch for pair in pairs if pair.patch is not None]
    if patches and len(patches) != len(pairs):
        raise RelpError("some of the pairs have a patch prompt and some have none")
    answer, foil = (_sets([getattr(pair, side) for pair in pairs]) for side in ("answer", "foil"))
    return PairBatch(
        original=torch.tensor([pair.original for pair in pairs]),
        patch=torch.tensor(patches) if patches else None,
        answer=answer[:, None] if pairs[0].several else answer,
        foil=foil[:, None] if pairs[0].several else foil,
        roles=pairs[0].roles,
    )


def _sets(rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Int[batch, k], filled with -1; a prompt without foil is a row of -1 only."""
    width = max([1, *map(len, rows)])
    return torch.tensor([list(row) + [-1] * (width - len(row)) for row in rows], dtype=torch.long)
