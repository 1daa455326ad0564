"""`pairs_from`: prompt pairs from lists of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.tasks.bos import HasTokenizer, choose_bos
from relp_cli.tasks.encoder import Encoder
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.prompt import PromptPair, RawPair
from relp_cli.tasks.task import batch_of, grouped
from relp_cli.tasks.tokenise import tokenise

Outcome = str | Sequence[str]


def pairs_from(
    model: HasTokenizer,
    originals: Sequence[str],
    patches: Sequence[str] | None = None,
    answers: Sequence[Outcome] | None = None,
    foils: Sequence[Outcome] | None = None,
    roles: Sequence[Mapping[str, Any]] | None = None,
    bos: bool | None = None,
    metric: str = "logit_diff",
) -> list[PairBatch]:
    """Texts as batches for `relp.score`, one per (token length, roles), the shorter first; within one, in the order given.

    originals, patches: prompts; each pair of one token length, never padded. Without patches: for baseline zero or mean.
    answers, foils:     what may follow: one text per pair, or several (a set). Each is one token after its original; a space
                        is put between where two words would touch. Foils may be left out.
    roles:              per pair a mapping from a name to a part of the original: a text that occurs in it once, or
                        (start, end) in characters. Without: positions are named after where original and patch differ.
    bos:                whether BOS is prepended; None: as the model was loaded.
    metric:             what they will be scored by: answer_logprob takes answers of several tokens, one text per pair.

    Raises: RelpError that names the item (from 0) that cannot be used: unequal token lengths, the same tokens twice, words that
    the vocabulary lacks, answers of several tokens, parts that are not there.
    """
    if not hasattr(model, "tokenizer"):
        raise RelpError(f"expected a model that relp.load_model returned, got a {type(model).__name__}")
    given = {"originals": originals, "patches": patches, "answers": answers, "foils": foils, "roles": roles}
    columns = {name: _column(name, values) for name, values in given.items() if values is not None}
    count = len(columns.get("originals", ()))
    if not count or "answers" not in columns:
        raise RelpError(f"pairs_from: no {'answers' if count else 'originals'}")
    for name, values in columns.items():
        if len(values) != count:
            raise RelpError(f"pairs_from: {len(values)} {name} for {count} originals")
    encoder = Encoder(model.tokenizer, model.name, choose_bos(model, bos).id)
    several = METRICS[metric].several
    items = ({name: values[number] for name, values in columns.items()} for number in range(count))
    pairs = [(tokenise(_raw(item, number), encoder, several), None) for number, item in enumerate(items)]
    return [batch_of([tokens for tokens, _ in group]) for group in grouped(pairs)]


def _column(name: str, values: Any) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise RelpError(f"pairs_from: {name}: expected a list, one item per pair, got a {type(values).__name__}")
    return list(values)


def _raw(item: Mapping[str, Any], number: int) -> RawPair:
    for name in ("originals", "patches"):
        if name in item and not isinstance(item[name], str):
            raise RelpError(f"pairs_from: {name}[{number}]: expected a text, got a {type(item[name]).__name__}")
    answer, foil = (_outcome(item.get(name, ()), f"pairs_from: {name}[{number}]") for name in ("answers", "foils"))
    if not answer:
        raise RelpError(f"pairs_from: answers[{number}]: expected at least one text")
    spans = _spans(item["originals"], item.get("roles", {}), f"pairs_from: roles[{number}]")
    pair = PromptPair(item["originals"], item.get("patches"), answer, foil, spans)
    return RawPair(pair, where=f"pairs_from: item {number}: ")


def _outcome(given: Any, where: str) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple | set) else (given,)
    if any(not isinstance(text, str) or not text for text in texts):
        raise RelpError(f"{where}: expected a text or several, none of them empty")
    return tuple(sorted(texts)) if isinstance(given, set) else texts


def _spans(original: str, roles: Any, where: str) -> tuple[tuple[str, int, int], ...]:
    if not isinstance(roles, Mapping):
        raise RelpError(f"{where}: expected name → part of the original, got a {type(roles).__name__}")
    spans = []
    for role, part in roles.items():
        if isinstance(part, str):
            if not part or original.count(part) != 1:
                raise RelpError(
                    f"{where}: '{part}' is {original.count(part) if part else 0} times in '{original}', expected once; give "
                    "(start, end) in characters"
                )
            part = (original.index(part), original.index(part) + len(part))
        fits = isinstance(part, list | tuple) and len(part) == 2 and all(isinstance(edge, int) for edge in part)
        if not fits or not 0 <= part[0] < part[1] <= len(original):
            raise RelpError(f"{where}: '{role}': expected (start, end) within 0 to {len(original)}, got {part!r}")
        spans.append((str(role), *part))
    return tuple(spans)
