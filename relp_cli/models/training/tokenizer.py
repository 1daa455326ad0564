"""The embedded models' word-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from relp_cli.tasks.spec import list_tasks, read_task


def tokenizer_for(texts: Sequence[str]) -> PreTrainedTokenizerFast:
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
