"""Small tokenizers and task files for the task tests, made here: no file outside the test folder is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Fake:
    """What a task needs of a model."""

    tokenizer: Any
    bos: int | None = None
    name: str = "fake"
    bos_asked: bool = False


def word_level(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """One token per word of `words`, anything else is <unk>; punctuation apart, digits in pairs."""
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<unk>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(r"\d{2}"), behavior="isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>", **special)


def pieces(words: list[str], bare: Sequence[str] = (), **special: str) -> PreTrainedTokenizerFast:
    """GPT-2's scheme with hand-made merges: words of `words` are whole after a space, those of `bare` by themselves, anything
    else goes by byte.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in [*("Ġ" + word for word in words), *bare]:
        for end in range(2, len(word) + 1):
            whole = word[:end]
            if whole not in vocabulary:
                vocabulary[whole] = len(vocabulary)
                merges.append((whole[:-1], whole[-1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def metaspace(words: list[str]) -> PreTrainedTokenizerFast:
    """Llama-2's scheme: a space is put before the text and spaces are ▁, which belong to the word after them; words of
    `words` are whole with and without it, anything else goes by character.
    """
    letters = sorted({*"▁\"'.,!?:", *"".join(words)})
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in [*words, *("▁" + word for word in words)]:
        steps = [(word[:end], word[end]) for end in range(1, len(word))]
        if word[0] == "▁":  # ▁ joins a word that is whole already
            steps = [("▁", word[1:])]
        for left, right in steps:
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def by_character(text: str) -> PreTrainedTokenizerFast:
    """One token per character of `text`."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])))


def write(folder: Path, name: str, text: str) -> Path:
    """A file in a test's own folder."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


SWAP = """\
name: swap
slots:
  A: people.txt
  B: people.txt
  PLACE: places.txt
templates:
  - "{S1=B} met {IO=A} at the {PLACE} . {S2=B} gave it to"
  - "So {S1=B} met {IO=A} at the {PLACE} . {S2=B} gave it to"
patch: {A: B, B: A}
balance: [A, B]
answer: "{A}"
"""
PEOPLE = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal"]
PLACES = ["park", "shop", "lake", "farm", "mill"]
SWAP_WORDS = [*PEOPLE, *PLACES, "So", "met", "at", "the", ".", "gave", "it", "to"]


def swap_task(folder: Path, text: str = SWAP) -> Path:
    """A small two-name task with its word lists."""
    write(folder, "people.txt", "\n".join(PEOPLE))
    write(folder, "places.txt", "# where\n" + "\n".join(PLACES) + "\n")
    return write(folder, "swap.yaml", text)
