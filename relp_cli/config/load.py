"""YAML → pydantic model, with `include`, dotted overrides, and errors that name file, line and key.

1. Each file is composed to YAML nodes, so that every key keeps its line; duplicate keys are refused, and aliases that would
   make more values than the file has characters.
2. `include: base.yaml` (or a list; `columns/NAME.yaml` is a shipped one) puts the base's values underneath: mappings merge, a
   null removes a key.
3. Overrides `a.b=value` (the value is YAML) are set last.
4. pydantic checks the result; its first complaint becomes one RelpError line.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from relp_cli.config.paths import data_root
from relp_cli.errors import RelpError, nearest

SHIPPED = "columns/"  # what is included by this name, and is no file beside the YAML, is a shipped one
MOST_FILES = 100  # that one file may include, each of them counted as often as it is
M = TypeVar("M", bound=BaseModel)
Key = tuple[str | int, ...]


@dataclass
class Source:
    """Plain values of a YAML file and where each key stands: key path → `file:line`."""

    path: Path
    values: Any = field(default_factory=dict)
    marks: dict[Key, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    room: int = 0  # how many more values the text may have

    def at(self, *key: str | int) -> str:
        """The `file:line: key: ` prefix of an error message; falls back to the nearest enclosing key."""
        known: Key = key
        while known and known not in self.marks:
            known = known[:-1]
        place = self.marks.get(known, f"{self.path}:1")
        return f"{place}: {'.'.join(map(str, key))}: " if key else f"{place}: "


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """A checked config and its source, for semantic checks that also want to name a line."""

    value: M
    source: Source


def load_config(path: str | Path, model: type[M], overrides: Sequence[str] = ()) -> M:
    """The file at `path` as a checked `model`. Raises: RelpError, one line `file:line: key: what was expected`."""
    return load_with_source(path, model, overrides).value


def load_with_source(path: str | Path, model: type[M], overrides: Sequence[str] = ()) -> Loaded[M]:
    """As `load_config`, and keeps the line of every key."""
    source = read_yaml(Path(path))
    for text in overrides:
        _override(source, text)
    try:
        return Loaded(model.model_validate(source.values), source)
    except ValidationError as error:
        raise RelpError(_one_line(error, model, source)) from None


def read_yaml(path: Path, _chain: tuple[Path, ...] = ()) -> Source:
    """The values of a YAML mapping with its includes merged in.

    Raises: RelpError as `read_values`, and for a circular include, too many of them, or a file that is not a mapping.
    """
    if path.resolve() in _chain:
        raise RelpError(f"{path}:1: include: circular, the file includes itself")
    source = read_values(path)
    if not isinstance(source.values, dict):
        raise RelpError(f"{path}:1: expected `key: value` lines at the top")
    bases = source.values.pop("include", [])
    for base in reversed([bases] if isinstance(bases, str) else bases if isinstance(bases, list) else [None]):
        if not isinstance(base, str):
            raise RelpError(f"{source.at('include')}expected a file name or a list of file names")
        base_path = path.parent / base
        if not base_path.is_file() and base.startswith(SHIPPED):
            base_path = data_root("configs") / base
        if not base_path.is_file():
            raise RelpError(f"{source.at('include')}no such file: {base_path}")
        below = read_yaml(base_path, (*_chain, path.resolve()))
        source.values = _merge(below.values, source.values)
        source.marks = below.marks | source.marks
        source.files = below.files + source.files
        if len(source.files) > MOST_FILES:
            raise RelpError(f"{source.at('include')}more than {MOST_FILES} files are included")
    return source


def read_values(path: Path) -> Source:
    """The values of a YAML file, whatever they are. Raises: RelpError for an unreadable file and as `parse`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RelpError(f"{path}: cannot be read: {error}") from None
    return parse(text, path)


def parse(text: str, path: Path) -> Source:
    """The values of a YAML text; `path` is what messages call it.

    Raises: RelpError for wrong YAML, a duplicate key, nesting beyond Python's limits, and aliases that expand to more values
    than the text has characters.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).partition("\n")[0]
        raise RelpError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except RecursionError:
        raise RelpError(f"{path}:1: nested too deeply") from None
    source = Source(path, files=[path], room=len(text) + 1000)
    source.values = None if node is None else _plain(node, (), source)
    return source


def _plain(node: yaml.Node, key: Key, source: Source) -> Any:
    """Node → plain Python value, recording the line of every key on the way."""
    source.marks.setdefault(key, f"{source.path}:{node.start_mark.line + 1}")
    if len(key) > 50:
        raise RelpError(f"{source.at(*key[:3])}nested too deeply (an anchor that contains itself?)")
    source.room -= 1
    if source.room < 0:
        raise RelpError(
            f"{source.at(*key[:3])}its aliases (`*name`) expand to more values than the file has characters"
        )
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            place = f"{source.path}:{name_node.start_mark.line + 1}"
            if not isinstance(name_node, yaml.ScalarNode):
                raise RelpError(f"{place}: keys must be plain words")
            if name in values:
                raise RelpError(f"{place}: {'.'.join(map(str, (*key, name)))}: duplicate key")
            source.marks[(*key, name)] = place
            values[name] = _plain(value_node, (*key, name), source)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*key, i), source) for i, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except yaml.YAMLError as error:
        raise RelpError(f"{source.at(*key)}{getattr(error, 'problem', None) or error}") from None
    except ValueError as error:
        many = "integer string conversion" in str(error)  # int() of thousands of digits
        raise RelpError(f"{source.at(*key)}{'a number of too many digits' if many else error}") from None


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings merge, a null takes the included key away, anything else replaces it."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        if value is None and name in merged:
            del merged[name]
            continue
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(source: Source, text: str) -> None:
    """Apply `a.b=value` to the values in place."""
    dotted, equals, raw = text.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise RelpError(f"override '{text}': expected dotted.key=value")
    value = parse(raw, Path(f"override '{text}'")).values
    here: Any = source.values
    key: Key = ()
    for i, part in enumerate(parts):
        step: str | int = int(part) if isinstance(here, list) and part.isdigit() else part
        key = (*key, step)
        last = i == len(parts) - 1
        if isinstance(here, list):
            if not isinstance(step, int) or step >= len(here):
                raise RelpError(f"override '{text}': {'.'.join(map(str, key))}: expected an index below {len(here)}")
        elif not isinstance(here, dict):
            raise RelpError(f"override '{text}': {'.'.join(map(str, key[:-1]))} has no keys below it")
        elif not last:
            here.setdefault(step, {})
        if last:
            here[step] = value
            source.marks = {k: v for k, v in source.marks.items() if k[: len(key)] != key}
            source.marks[key] = f"override '{text}'"
        else:
            here = here[step]


def _one_line(error: ValidationError, model: type[BaseModel], source: Source) -> str:
    """pydantic's first complaint as `file:line: key: what was expected`."""
    errors = error.errors(include_url=False)
    # A complaint that reaches deeper into the data says more than "not a string" of another branch of a union.
    first = max(errors, key=lambda e: (e["type"] == "extra_forbidden", len(_data_key(e["loc"], source.values))))
    key = _data_key(first["loc"], source.values)
    kind, message = first["type"], first["msg"].replace("Input should be", "expected").replace("Value error, ", "")
    if kind == "extra_forbidden":
        known = _known_keys(model, key[:-1])
        return f"{source.at(*key)}unknown key{nearest(str(key[-1]), known)}"
    if kind == "missing":
        name = str(first["loc"][-1])
        return f"{source.at(*key)}missing key '{name}'"
    got = repr(first["input"])
    shown = "" if kind == "value_error" or len(got) > 60 else f", got {got}"
    return f"{source.at(*key)}{message}{shown}"


def _data_key(loc: tuple[str | int, ...], values: Any) -> Key:
    """pydantic's `loc` without the union branches it names: only what indexes the data."""
    key: Key = ()
    for part in loc:
        found = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if found:
            values = values[part]
            key = (*key, part)
    return key


def _known_keys(model: type[BaseModel], key: Key) -> set[str]:
    """Field names that are valid at `key`, over all branches of unions."""
    models = {model}
    for part in key:
        below = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if below:
            models = {found for annotation in below for found in _models_in(annotation)}
    return {field.alias or name for m in models for name, field in m.model_fields.items()}


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {found for arg in typing.get_args(annotation) for found in _models_in(arg)}
