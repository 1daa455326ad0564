"""Token ids that belong to another tokenizer: read as text with it, and encoded anew for the model in use.

1. An answer's id becomes the text by which it continues the prompt, in its own tokenizer's decoding.
2. That text must give the id back there, and must be what the model's own tokens continue the prompt with.
3. Whatever does not come back is refused (or dropped and counted, `unusable`); no id is ever used in another vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.registry import load
from relp_cli.tasks.encoder import Encoder
from relp_cli.tasks.prompt import PromptPair, RawPair

LOADER = "relp_cli.models.load:load_tokenizer"  # by name: models stand above tasks


def where_is(name: str, base: Path) -> str:
    """The folder beside the task's file that `name` means, or `name` itself (embedded, another folder, on the hub)."""
    beside = base / name
    return str(beside) if beside.is_dir() else name


def tokenizer_files(name: str, base: Path) -> list[Path]:
    """What a local tokenizer is made of; [] for one on the hub or in the package."""
    folder = Path(where_is(name, base)).expanduser()
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    return [folder / file for file in names if (folder / file).is_file()]


@lru_cache(maxsize=8)
def _loaded(where: str) -> Any:
    return load(LOADER)(where)


class Foreign:
    """The tokenizer that a file's ids belong to. Raises: RelpError where it cannot be loaded."""

    def __init__(self, name: str, base: Path) -> None:
        self.name = name
        self._own = Encoder(_loaded(where_is(name, base)), name, None)
        self._same: dict[str, bool] = {}

    def is_of(self, encoder: Encoder) -> bool:
        """Whether the model has the very same vocabulary, so that ids mean the same tokens."""
        if encoder.name not in self._same:
            other = encoder.tokenizer
            self._same[encoder.name] = other is not None and other.get_vocab() == self._own.tokenizer.get_vocab()
        return self._same[encoder.name]

    def as_text(self, raw: RawPair, encoder: Encoder) -> RawPair:
        """The pair with texts in place of ids; as it is where the model's vocabulary is the very same.

        Raises: RelpError where the way to text and back does not give the same ids and the same text.
        """
        if self.is_of(encoder):
            return raw
        if encoder.tokenizer is None:
            raise RelpError(f"{encoder.name} has no tokenizer: ids of {self.name} cannot be encoded for it")
        if raw.labels is not None and raw.ids is not None:
            raise RelpError(
                f"{raw.where}roles: one label per token of {self.name}, whose tokens are not {encoder.name}'s"
            )
        pair = raw.pair
        if raw.ids is not None:
            one, two = (None if ids is None else self._prompt(ids, raw.where) for ids in raw.ids)
            pair = PromptPair(one or "", two, pair.answer, pair.foil)
        if raw.outcome_ids is None:
            return replace(raw, pair=pair, ids=None)
        answer, foil = (self._outcomes(pair.original, ids, encoder, raw.where) for ids in raw.outcome_ids)
        return replace(raw, pair=replace(pair, answer=answer, foil=foil), ids=None, outcome_ids=None, join="")

    def _prompt(self, ids: Sequence[int], where: str) -> str:
        """A prompt's text, without the BOS token that it may start with: the model gets its own."""
        bos = self._own.own_bos
        ids = ids[1:] if len(ids) > 1 and ids[0] == bos else ids
        text = self._decode(ids, where)
        if self._own.encode(text)[0] != tuple(ids):
            raise RelpError(f"{where}the ids of {self.name} do not come back from their text {text!r}")
        return text

    def _outcomes(self, prompt: str, ids: Sequence[int], encoder: Encoder, where: str) -> tuple[str, ...]:
        before = self._own.known(prompt, where)[0]
        return tuple(self._outcome(prompt, before, i, encoder, where) for i in ids)

    def _outcome(self, prompt: str, before: Sequence[int], token: int, encoder: Encoder, where: str) -> str:
        text = _continuation(self._decode(before, where), self._decode((*before, token), where))
        if text is None or not text.strip() or "\ufffd" in text:
            raise RelpError(f"{where}token {token} of {self.name} is no text by itself")
        if (token,) not in (self._own.encode(text)[0], self._own.encode(prompt + text)[0][len(before) :]):
            raise RelpError(f"{where}token {token} of {self.name} is {text!r}, which does not give it back")
        (ids,) = encoder.outcomes(prompt, [text], "")
        if len(ids) == 1 and ids[0] != encoder.unk:  # what is no single token is refused where pairs are tokenised
            own = encoder.known(prompt, where)[0]
            back = _continuation(_decoded(encoder.tokenizer, own), _decoded(encoder.tokenizer, (*own, *ids)))
            if back is None or back.split() != text.split():
                raise RelpError(f"{where}{text!r} of {self.name} comes back as {back!r} from {encoder.name}")
        return text

    def _decode(self, ids: Sequence[int], where: str) -> str:
        if over := [i for i in ids if i >= len(self._own.tokenizer)]:
            raise RelpError(f"{where}{self.name} has no token {over[0]} (it has {len(self._own.tokenizer)})")
        return _decoded(self._own.tokenizer, ids)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def _continuation(before: str, whole: str) -> str | None:
    """What the decoding of prompt and answer has beyond that of the prompt; None where it does not begin with it."""
    return whole[len(before) :] if whole.startswith(before) else None
