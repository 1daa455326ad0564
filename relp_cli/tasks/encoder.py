"""A model's tokenizer as tasks use it: token ids with offsets, single tokens in their place, and the tokens of answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from relp_cli.errors import RelpError
from relp_cli.tasks.spacing import space_between

Offsets = list[tuple[int, int]]


class Encoder:
    """A fast Hugging Face tokenizer used without its special tokens, and the BOS id to prepend (None: none).

    merged: answers that merge with the prompt's last word, and how (`outcomes`). words, left_out: of word lists that answers
    were taken from, all, and those that are no single tokens (`members`).
    """

    def __init__(self, tokenizer: Any, model_name: str, bos: int | None) -> None:
        if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
            raise RelpError(f"the tokenizer of {model_name} gives no character offsets (not a fast tokenizer)")
        self.tokenizer, self.name, self.bos = tokenizer, model_name, bos
        self.merged: dict[str, str] = {}
        self.words: set[str] = set()
        self.left_out: set[str] = set()
        self._singles: dict[tuple[str, str, str], bool] = {}
        # A prompt is asked for again with each of its answers.
        self._seen: dict[str, tuple[int, ...]] = {}

    @cached_property
    def unk(self) -> int | None:
        """The id that stands for unknown text; None for tokenizers that can spell everything."""
        unk = self.tokenizer.unk_token_id
        # Byte-level tokenizers name an ordinary special token (GPT-2, SmolLM2: end of text) that unknown text never becomes.
        return None if unk in (None, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id) else int(unk)

    @cached_property
    def own_bos(self) -> int | None:
        """The BOS id that a prompt may start with by itself, whether or not one would be prepended."""
        return self.bos if self.bos is not None else getattr(self.tokenizer, "bos_token_id", None)

    def encode(self, text: str) -> tuple[tuple[int, ...], Offsets]:
        """Token ids of the text and their character spans, unknown tokens included."""
        encoded = self._call(text, return_offsets_mapping=True)
        ids = self._seen[text] = tuple(encoded["input_ids"])
        return ids, [tuple(span) for span in encoded["offset_mapping"]]

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
        unknown = [text[s:e] for i, (s, e) in zip(ids, offsets, strict=True) if i == self.unk]
        missing = [word for word in unknown if word != self.tokenizer.unk_token]  # that token itself may be written
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

    def outcomes(self, prompt: str, answers: Sequence[str], join: str | None) -> list[tuple[int, ...]]:
        """Per answer, the token ids that follow the prompt's own in the tokenisation of prompt + join + answer.

        join: None for `space_between`. () where the two merge: the joined text does not begin with the prompt's tokens.
        Where a join is given and is no space, the answer goes on with the prompt's last word ("17" + "76"); if they merge
        there ("1776" is a token), it is the single token that a model, which writes token by token, would go on with.
        """
        texts = [(space_between(prompt, answer) if join is None else join) + answer for answer in answers]
        before, *joined = self._ids([prompt, *(prompt + text for text in texts)])
        found = []
        for answer, text, ids in zip(answers, texts, joined, strict=True):
            following = ids[len(before) :] if ids[: len(before)] == before else ()
            if not following and join is not None and not (text[:1].isspace() or prompt[-1:].isspace()):
                following = self._going_on(text)
                if following:
                    self.merged.setdefault(answer, f"'{prompt.split()[-1]}' + '{text}'")
            found.append(following)
        return found

    def _going_on(self, text: str) -> tuple[int, ...]:
        (ids,) = self._ids([text])
        starts_a_word = len(ids) == 1 and str(self.tokenizer.convert_ids_to_tokens(ids[0]))[:1] in "▁Ġ"
        return () if len(ids) != 1 or starts_a_word else ids

    def _ids(self, texts: list[str]) -> list[tuple[int, ...]]:
        if new := [text for text in dict.fromkeys(texts) if text not in self._seen]:
            self._seen |= zip(new, map(tuple, self._call(new)["input_ids"]), strict=True)
        return [self._seen[text] for text in texts]

    def _call(self, text: str | list[str], **more: bool) -> Any:
        if self.tokenizer is None:
            raise self._no_tokenizer()
        try:
            return self.tokenizer(text, add_special_tokens=False, **more)
        except Exception as error:  # bare ones of the Rust library: a vocabulary without its own unknown token
            shown = text if isinstance(text, str) else text[0]
            raise RelpError(
                f"the tokenizer of {self.name} cannot encode '{shown}', is tokenizer.json broken? ({error})"
            ) from error

    def _no_tokenizer(self) -> RelpError:
        return RelpError(f"{self.name} has no tokenizer: only pairs of token ids can be used with it")

    def check_known(self, ids: Sequence[int], where: str) -> None:
        """Raises: RelpError for an id that the vocabulary does not have: it is another tokenizer's."""
        if self.tokenizer is not None and max(ids) >= len(self.tokenizer):
            raise RelpError(
                f"{where}token id {max(ids)}: {self.name} has {len(self.tokenizer)} tokens; whose id is it? `ids_of: MODEL` in a "
                "task YAML, or --ids-of MODEL"
            )

    def is_outcome(self, ids: Sequence[int]) -> bool:
        """Whether an answer is one known token."""
        return len(ids) == 1 and ids[0] != self.unk

    def outcome_ids(self, prompt: str, answers: Sequence[str], join: str | None, where: str) -> tuple[int, ...]:
        """The single token of each answer. Raises: RelpError that shows the pieces otherwise."""
        found = self.outcomes(prompt, answers, join)
        for answer, ids in zip(answers, found, strict=True):
            if not ids:
                raise self._merges(prompt, answer, join, where)
            if not self.is_outcome(ids):
                hint = "" if self.unk in ids else "; metric answer_logprob reads answers of several tokens"
                raise RelpError(
                    f"{where}answer '{answer}' is not a single token of {self.name}: {self.pieces(ids)}{hint}"
                )
        return tuple(ids[0] for ids in found)

    def sequence(self, prompt: str, answer: str, join: str | None, where: str) -> tuple[int, ...]:
        """All tokens of an answer. Raises: RelpError where it merges with the prompt, or has unknown tokens."""
        (ids,) = self.outcomes(prompt, [answer], join)
        if not ids:
            raise self._merges(prompt, answer, join, where)
        if self.unk in ids:
            raise RelpError(f"{where}answer '{answer}': not in the vocabulary of {self.name}: {self.pieces(ids)}")
        return ids

    def _merges(self, prompt: str, answer: str, join: str | None, where: str) -> RelpError:
        whole = prompt + (space_between(prompt, answer) if join is None else join) + answer
        before, after = (self.pieces(ids[-4:]) for ids in self._ids([prompt, whole]))
        return RelpError(
            f"{where}answer '{answer}' is not one token more than the prompt for {self.name}: the prompt ends in "
            f"{before}, with the answer in {after}; end the prompt where a token ends, or give `answer_id`"
        )

    def first_ids(
        self, prompt: str, answer: str, foil: str, join: str | None, where: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The first token of an answer and of its foil, which have equally many. Raises: RelpError otherwise, and where they
        share it or it is unknown.
        """
        two = self.outcomes(prompt, (answer, foil), join)
        pieces = f"'{answer}' ({self.pieces(two[0])}) and '{foil}' ({self.pieces(two[1])})"
        if not all(two) or self.unk in (two[0][0], two[1][0]):
            raise RelpError(f"{where}{pieces}: not what follows the prompt in the vocabulary of {self.name}")
        if len(two[0]) != len(two[1]):
            raise RelpError(f"{where}{pieces} have different token lengths for {self.name}")
        if two[0][0] == two[1][0]:
            raise RelpError(f"{where}{pieces} begin with the same token for {self.name}")
        return two[0][:1], two[1][:1]

    def members(self, prompt: str, words: Sequence[str], join: str | None, where: str) -> list[int | None]:
        """As `outcome_ids`, for words of a list: None for those that are no single tokens, which `left_out` remembers."""
        found = [ids[0] if self.is_outcome(ids) else None for ids in self.outcomes(prompt, words, join)]
        self.words.update(words)
        self.left_out.update(word for word, token in zip(words, found, strict=True) if token is None)
        if words and not any(token is not None for token in found):
            raise RelpError(
                f"{where}none of {len(words)} listed answers ('{words[0]}', …) is a single token of {self.name}"
            )
        return found
