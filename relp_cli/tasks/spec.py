"""The task YAML: what it may say, and its checks. No torch, no tokenizer.

A template task has `slots` (word lists), `templates`, `patch` (how the counterfactual is made), `answer` and `foil`;
a file task has `pairs: FILE`. See configs/tasks/ for examples of both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from relp_cli.config.load import Source, load_with_source
from relp_cli.config.paths import find_config, list_configs
from relp_cli.errors import RelpError, nearest, unknown
from relp_cli.tasks.columns import Columns, FormSet, Strict, WordSet
from relp_cli.tasks.foreign import tokenizer_files
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.records import FILE_ENDINGS
from relp_cli.tasks.template import Mention, Template, parse
from relp_cli.tasks.words import WordList, find_list, inline_list, read_list

OTHER = "other"
NAME_BYTES = 100
_NAME = re.compile(r"\w[\w.-]*")


class SlotSpec(Strict):
    """Where a slot's words come from. `single`: its words must be single tokens in their place (default: for lists)."""

    list: str | None = Field(default=None, description="a shipped word list, or a file relative to this YAML")
    values: tuple[str | dict[str, str], ...] | None = Field(default=None, description="words written here")
    single: bool | None = None

    @model_validator(mode="after")
    def _one_of(self) -> SlotSpec:
        if (self.list is None) == (self.values is None):
            raise ValueError("expected either `list: NAME` or `values: [...]`")
        return self


class TaskSpec(Strict):
    """One task: templates, or a file of fixed pairs."""

    name: str
    description: str = Field(default="", description="one line for people")
    metric: str = Field(default="logit_diff", description="what is measured (docs/methods.md)")
    pairs: str | None = Field(default=None, description="a file of fixed pairs, in place of slots and templates")
    columns: Columns | None = Field(default=None, description="`pairs` only: which columns of the file are what")
    only: dict[str, str | int | bool] = Field(
        default={}, description="`columns` only: column → value of the records taken"
    )
    cut: str = Field(default="", description="`columns` only: taken off the start of prompts (a BOS token in the text)")
    ids_of: str | None = Field(default=None, description="`pairs` only: the model whose token ids the file holds")
    slots: dict[str, SlotSpec] = Field(default={}, description="what the templates are filled with")
    templates: tuple[str, ...] = Field(
        default=(), description="{SLOT}, {ROLE=SLOT}, {SLOT.form}, {SLOT[SLOT]} in a text"
    )
    patch: dict[str, str] = Field(default={}, description="slot or role → the slot shown there instead, or `other`")
    answer: str | tuple[str, ...] | WordSet | None = Field(
        default=None, description="a word, a slot, a list of them, or a set"
    )
    foil: str | tuple[str, ...] | WordSet | None = Field(
        default=None, description="default: the answer to the patch prompt"
    )
    balance: tuple[str, ...] = Field(
        default=(), description="slots of one list in which each word occurs equally often"
    )
    join: str | None = Field(default=None, description="between prompt and answer; default: a space where words touch")
    unusable: Literal["error", "drop"] = Field(
        default="error",
        description="`pairs` only: refuse a file with pairs that do not fit the model, or drop and count",
    )

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        """It becomes the name of folders and files."""
        if not _NAME.fullmatch(name) or ".." in name or len(name.encode()) > NAME_BYTES:
            raise ValueError(f"expected a name of letters, digits and - _ . (no '..', at most {NAME_BYTES} bytes)")
        return name

    @field_validator("metric")
    @classmethod
    def _is_a_metric(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(str(unknown("metric", metric, METRICS)))
        return metric

    @field_validator("slots", mode="before")
    @classmethod
    def _shorthand(cls, slots: Any) -> Any:
        """`A: names` is short for `A: {list: names}`."""
        if not isinstance(slots, dict):
            return slots
        return {name: {"list": slot} if isinstance(slot, str) else slot for name, slot in slots.items()}


@dataclass(frozen=True)
class TaskText:
    """A checked task: its spec, parsed templates, word lists by list name, and a hash of everything it reads.

    `slot_lists`: slot → name of its list (values written in the task are lists named after their slot). A slot that
    the pairing rule changes to `other` has a hidden partner slot, here under `<slot>~`.
    """

    spec: TaskSpec
    path: Path
    hash: str
    templates: tuple[Template, ...] = ()
    answer: tuple[Mention | WordSet, ...] = ()
    foil: tuple[Mention | WordSet, ...] = ()
    patch: Mapping[str, str] = field(default_factory=dict)
    slot_lists: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, WordList] = field(default_factory=dict)

    @property
    def role_patch(self) -> dict[str, str]:
        """The part of the pairing rule that changes single mentions: role → slot shown there instead."""
        return {target: slot for target, slot in self.patch.items() if target not in self.spec.slots}

    @property
    def slot_patch(self) -> dict[str, str]:
        """The part of the pairing rule that changes slots: slot → slot whose word it takes."""
        return {target: slot for target, slot in self.patch.items() if target in self.spec.slots}

    def changes(self, mention: Mention) -> bool:
        """Whether the pairing rule may change this mention."""
        return bool({mention.role, mention.slot, mention.index} & set(self.patch))

    def single(self, slot: str) -> bool:
        """Whether the words of this slot must be single tokens."""
        spec = self.spec.slots[slot.removesuffix("~")]
        return spec.list is not None if spec.single is None else spec.single


def list_tasks() -> list[str]:
    """Names of the shipped tasks."""
    return list_configs("tasks")


def read_task(name_or_path: str | Path) -> TaskText:
    """A shipped task ("ioi") or a YAML file, read and checked.

    Raises: RelpError, one line that names file, line and key.
    """
    path = find_config("tasks", name_or_path)
    loaded = load_with_source(path, TaskSpec)
    spec, source = loaded.value, loaded.source
    used = [spec.slots, spec.templates, spec.patch, spec.answer, spec.foil, spec.balance]
    if spec.pairs is not None:
        if any(used):
            raise RelpError(f"{source.at('pairs')}a task has either `pairs: FILE` or slots and templates, not both")
        file = path.parent / spec.pairs
        if file.suffix not in FILE_ENDINGS:
            raise RelpError(
                f"{source.at('pairs')}expected a file that ends in {', '.join(FILE_ENDINGS)}, got '{spec.pairs}'"
            )
        if not file.is_file():
            raise RelpError(f"{source.at('pairs')}no such file: {file}")
        return _check_columns(spec, source, file)
    for key in ("columns", "only", "cut", "ids_of"):
        if getattr(spec, key):
            raise RelpError(f"{source.at(key)}belongs to `pairs: FILE`")
    for key in ("slots", "templates", "answer"):
        if not getattr(spec, key):
            raise RelpError(f"{source.at(key)}missing; a task needs slots, templates and answer, or `pairs: FILE`")
    return _check_templates(spec, source)


def _check_columns(spec: TaskSpec, source: Source, file: Path) -> TaskText:
    """A file's task, with the word lists that its columns name."""
    lists: dict[str, WordList] = {}
    for key in ("only", "cut"):
        if getattr(spec, key) and spec.columns is None:
            raise RelpError(f"{source.at(key)}belongs to `columns`")
    if spec.columns is not None and spec.columns.ids and spec.ids_of is None:
        raise RelpError(
            f"{source.at('columns')}token ids need `ids_of: MODEL`, the model whose tokenizer they belong to"
        )
    for key, words in (spec.columns.sets if spec.columns is not None else {}).items():
        at = key if key in source.values["columns"] else "answer"
        where = source.at("columns", at)
        _read_into(lists, words.list, source, where)
        for form in words.forms.values() if isinstance(words, FormSet) else ():
            if form not in lists[words.list].columns:
                known = lists[words.list].columns
                raise RelpError(f"{where}'{words.list}' has no form '{form}'{nearest(form, known)}")
    files = [*source.files, file, *(words.path for words in lists.values() if words.path is not None)]
    if spec.ids_of is not None:
        files += tokenizer_files(spec.ids_of, source.path.parent)
    return TaskText(spec, source.path, content_hash(files), lists=lists)


def content_hash(files: list[Path]) -> str:
    """Hash of the contents of the files, whatever their paths."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{len(content)}:".encode() + content)
    return digest.hexdigest()[:16]


def _check_templates(spec: TaskSpec, source: Source) -> TaskText:
    lists: dict[str, WordList] = {}
    slot_lists: dict[str, str] = {}
    patch = {target: f"{target}~" if to == OTHER else to for target, to in spec.patch.items()}
    for slot, slot_spec in spec.slots.items():
        where = source.at("slots", slot)
        name = slot_spec.list or slot
        if slot_spec.values is not None:
            lists[name] = inline_list(name, slot_spec.values, where.rstrip(": "))
        else:
            _read_into(lists, name, source, where)
        slot_lists[slot] = name
        if patch.get(slot) == f"{slot}~":
            slot_lists[f"{slot}~"] = name
    templates = tuple(_parse(text, source, "templates", i) for i, text in enumerate(spec.templates))
    answer = _outcomes(spec.answer, lists, source, "answer")
    foil = _outcomes(spec.foil, lists, source, "foil")
    task = TaskText(spec, source.path, "", templates, answer, foil, patch, slot_lists, lists)
    for i, template in enumerate(templates):
        for mention in template.mentions:
            _check_mention(mention, task, source.at("templates", i))
    for key, outcomes in (("answer", answer), ("foil", foil)):
        for outcome in outcomes:
            if isinstance(outcome, Mention):
                _check_mention(outcome, task, source.at(key))
            elif outcome.slot not in spec.slots:
                raise RelpError(f"{source.at(key)}unknown slot '{outcome.slot}'{nearest(outcome.slot, spec.slots)}")
    _check_rule(task, source)
    files = source.files + [words.path for _, words in sorted(lists.items()) if words.path is not None]
    return TaskText(spec, source.path, content_hash(files), templates, answer, foil, patch, slot_lists, lists)


def _read_into(lists: dict[str, WordList], name: str, source: Source, where: str) -> None:
    if name not in lists:
        try:
            lists[name] = read_list(name, find_list(name, source.path.parent, source.path))
        except RelpError as error:
            raise RelpError(f"{where}{error}") from None


def _parse(text: str, source: Source, *key: str | int) -> Template:
    try:
        return parse(text)
    except ValueError as error:
        raise RelpError(f"{source.at(*key)}{error}") from None


def _outcomes(
    value: str | tuple[str, ...] | WordSet | None, lists: dict[str, WordList], source: Source, key: str
) -> tuple[Mention | WordSet, ...]:
    """`answer` or `foil` as a set: mentions of slots, constant words (a Mention without slot), or a WordSet."""
    if value is None:
        return ()
    if isinstance(value, WordSet):
        _read_into(lists, value.list, source, source.at(key))
        return (value,)
    outcomes = []
    for text in (value,) if isinstance(value, str) else value:
        parts = _parse(text, source, key).parts
        if len(parts) != 1:
            raise RelpError(f"{source.at(key)}expected one word or one slot, got '{text}'")
        outcomes.append(parts[0] if isinstance(parts[0], Mention) else Mention(role=parts[0], slot=""))
    return tuple(outcomes)


def _check_mention(mention: Mention, task: TaskText, where: str) -> None:
    if not mention.slot:
        return
    slots = task.spec.slots
    for slot in (mention.slot, mention.index):
        if slot is not None and slot not in slots:
            raise RelpError(f"{where}unknown slot '{slot}'{nearest(slot, slots)}")
    columns = task.lists[task.slot_lists[mention.slot]].columns
    wanted = [mention.column] if mention.column else []
    if mention.index:
        wanted = [row.key for row in task.lists[task.slot_lists[mention.index]].rows]
    for column in wanted:
        if column not in columns:
            name = task.slot_lists[mention.slot]
            raise RelpError(f"{where}'{name}' has no form '{column}'{nearest(column, columns)}")


def _check_rule(task: TaskText, source: Source) -> None:
    """The pairing rule and the balance name things that exist, and the rule changes every template."""
    slots = task.spec.slots
    roles = {mention.role for template in task.templates for mention in template.mentions}
    for target, to in task.spec.patch.items():
        where = source.at("patch", target)
        if target not in slots and target not in roles:
            raise RelpError(f"{where}unknown slot or role '{target}'{nearest(target, {*slots, *roles})}")
        if target not in slots and to == OTHER:
            raise RelpError(f"{where}`other` needs a slot; '{target}' is a role: name the slot to show there")
        if to != OTHER and to not in slots:
            raise RelpError(f"{where}unknown slot '{to}'{nearest(to, [*slots, OTHER])}")
        replaced = {m.slot for template in task.templates for m in template.mentions if target in (m.role, m.slot)}
        for slot in (replaced & set(slots)) if to != OTHER else ():
            if task.lists[task.slot_lists[slot]].columns != task.lists[task.slot_lists[to]].columns:
                raise RelpError(f"{where}the words of '{slot}' and '{to}' have different forms")
    for i, template in enumerate(task.templates):
        if task.patch and not any(task.changes(mention) for mention in template.mentions):
            raise RelpError(f"{source.at('templates', i)}the patch rule changes nothing in this template")
    if task.role_patch and not task.slot_patch and not task.spec.foil:
        raise RelpError(f"{source.at('foil')}missing; the patch rule changes roles only, so the foil must be given")
    for slot in task.spec.balance:
        if slot not in slots:
            raise RelpError(f"{source.at('balance')}unknown slot '{slot}'{nearest(slot, slots)}")
    if len({task.slot_lists[slot] for slot in task.spec.balance}) > 1:
        raise RelpError(f"{source.at('balance')}the balanced slots must draw from the same word list")
