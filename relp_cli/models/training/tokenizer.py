"""The embedded models' word-level tokenizer: making it, and reading it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from relp_cli.tasks.spec import list_tasks, read_task

_AS_WRITTEN = ("TokenizersBackend", "PreTrainedTokenizerFast")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    `AutoTokenizer` replaces whatever a Qwen2 folder holds by its own byte-pair scheme (a list inside Transformers
    5 distrusts such folders); a folder that says its tokenizer.json is to be used as written is taken at its word.
    """
    config = folder / "tokenizer_config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") in _AS_WRITTEN:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def tokenizer_for(texts: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over every word of the shipped lists and of `texts`; digits go in pairs."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(r"\d{2}"), behavior="isolated")]
    )
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    for name in list_tasks():
        task = read_task(name)
        words |= {word for rows in task.lists.values() for row in rows.rows for word in row.words}
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
