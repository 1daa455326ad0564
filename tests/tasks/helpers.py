"""Small tokenizers and task files for the task tests, made here: no file outside the test folder is read."""

from __future__ import annotations

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


def word_level(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """One token per word of `words`, anything else is <unk>; punctuation apart, digits in pairs."""
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<unk>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(r"\d{2}"), behavior="isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>", **special)


def pieces(words: list[str]) -> PreTrainedTokenizerFast:
    """GPT-2's scheme with hand-made merges: words of `words` are whole after a space, anything else goes by byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 2):
            whole = ("Ġ" + word)[:end]
            if whole not in vocabulary:
                vocabulary[whole] = len(vocabulary)
                merges.append((whole[:-1], whole[-1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


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
