"""What a task YAML may say of the columns of a file that others published. `mapped` reads such a file. No torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WordSet(Strict):
    """A set of words of an ordered list: those after a slot's (or column's) word, or those up to and including it."""

    list: str
    after: str | None = None
    upto: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> WordSet:
        if (self.after is None) == (self.upto is None):
            raise ValueError("expected either `after: SLOT` or `upto: SLOT`")
        return self

    @property
    def slot(self) -> str:
        return self.after or self.upto or ""


class FormSet(Strict):
    """All words of a list, in the form that a column's value picks: `{list: verbs, by: plural, forms: {true: pl, false: sg}}`.

    The foil, unless the task names one, is the same words in the other form; a list of one pair of words is one answer.
    """

    list: str
    by: str
    forms: dict[str, str]

    @field_validator("forms", mode="before")
    @classmethod
    def _keys(cls, forms: Any) -> Any:
        return {str(key).lower(): form for key, form in forms.items()} if isinstance(forms, dict) else forms

    @model_validator(mode="after")
    def _two(self) -> FormSet:
        if len(self.forms) != 2:
            raise ValueError("expected two values of the column, each with the form it stands for")
        return self

    def other(self) -> FormSet:
        """The same words in the form that the other value stands for."""
        (a, one), (b, two) = self.forms.items()
        return FormSet(list=self.list, by=self.by, forms={a: two, b: one})


def _sort(value: Any) -> str:
    """Which of the three is meant: what is wrong in one of them is then told of that one alone."""
    if isinstance(value, FormSet) or (isinstance(value, dict) and ({"by", "forms"} & set(value))):
        return "forms"
    return "words" if isinstance(value, dict | WordSet) else "column"


OneSet = Annotated[
    Annotated[str, Tag("column")] | Annotated[WordSet, Tag("words")] | Annotated[FormSet, Tag("forms")],
    Discriminator(_sort),
]


class Columns(Strict):
    """Our name of each part of a pair → the column that holds it.

    A column is its name, or a path into nested records and lists: `meta.answer`, `labels.0`, `choices.label[answerKey]`
    (the entry whose number or key stands in column `answerKey`). A prompt may be a list of texts, which are joined as they are.
    """

    original: str | None = None
    patch: str | None = None
    answer: OneSet | None = Field(default=None, description="one text, a list of texts, or a set of a word list")
    foil: OneSet | None = None
    original_ids: str | None = None
    patch_ids: str | None = None
    answer_id: str | None = Field(default=None, description="token ids of the tokenizer that `ids_of` names")
    foil_id: str | None = None
    good: str | None = Field(default=None, description="with `bad`: two sentences, which differ in one word")
    bad: str | None = None
    roles: str | None = None
    split: str | None = None
    join: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Columns:
        sentences = self.good is not None
        if sentences != (self.bad is not None):
            raise ValueError("`good` and `bad` go together: two columns of sentences that differ in one word")
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        if sentences:
            if more := sorted(given - {"good", "bad", "split"}):
                raise ValueError(f"`good` and `bad` give prompt, answer and foil; leave out {', '.join(more)}")
            return self
        for what, two in (("prompt", ("original", "original_ids")), ("answer", ("answer", "answer_id"))):
            if len(given & set(two)) != 1:
                raise ValueError(f"the {what} needs one column: either `{two[0]}` or `{two[1]}`")
        for one, other in (("original", "patch_ids"), ("original_ids", "patch"), ("answer", "foil_id")):
            if {one, other} <= given:
                raise ValueError(f"`{one}` and `{other}`: both must be texts, or both token ids")
        if {"answer_id", "foil"} <= given:
            raise ValueError("`answer_id` and `foil`: both must be texts, or both token ids")
        if "original_ids" in given and ("answer" in given or "join" in given):
            raise ValueError("prompts of token ids go with `answer_id`, not with texts")
        return self

    @property
    def ids(self) -> bool:
        """Whether any column holds token ids."""
        return self.original_ids is not None or self.answer_id is not None

    @property
    def sets(self) -> dict[str, WordSet | FormSet]:
        """Which of answer and foil are sets of word lists."""
        both = {"answer": self.answer, "foil": self.foil}
        if isinstance(self.answer, FormSet) and self.foil is None:
            both["foil"] = self.answer.other()
        return {key: value for key, value in both.items() if isinstance(value, WordSet | FormSet)}
