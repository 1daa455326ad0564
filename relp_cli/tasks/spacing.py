"""What stands between a prompt and its answer where nobody said: a space where two words would touch. Pure text."""

from __future__ import annotations

import unicodedata

_CLOSING = ".,;:!?%…)]}»”’"
_QUOTES = "\"'"
# Scripts that put no space between words, by how Unicode names their characters and punctuation.
_UNSPACED = (
    "CJK", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR",
    "TIBETAN",
)  # fmt: skip


def space_between(prompt: str, answer: str) -> str:
    """`" "` or `""`.

    A space, where the answer begins with a letter and the prompt ends in a word, a closing mark, a closing quote, or a sign
    that stands alone (`cat ->`). None after white space, after an opening quote or bracket (`He said "`), after a sign
    that is attached (`well-`), after a script without spaces (Chinese, Japanese, Thai …), and before digits.
    """
    last = prompt[-1:]
    if not answer[:1].isalpha() or not last or last.isspace():
        return ""
    if unicodedata.name(last, "").startswith(_UNSPACED):
        return ""
    if unicodedata.category(last)[0] in "LMN" or last in _CLOSING:
        return " "
    if unicodedata.category(last) in ("Ps", "Pi"):
        return ""
    word = prompt.split()[-1]
    if last in _QUOTES:
        return "" if _opens(word) else " "
    return " " if not any(c.isalnum() for c in word) else ""


def _opens(word: str) -> bool:
    """Whether the quote at the end of `word` opens: only opening marks stand before it."""
    return all(c in _QUOTES or unicodedata.category(c) in ("Ps", "Pi", "Pd") for c in word)
