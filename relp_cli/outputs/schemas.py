"""JSON Schemas (draft 2020-12) of what people write: tasks, jobs, and records of pair files. Editors complete and check by them.

They are made of the pydantic models and the tables of names, and say of a file's form what these say; whether names of lists,
slots and files are there is `relp validate`'s. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from relp_cli.config.paths import list_configs
from relp_cli.features.kinds import FEATURE_KINDS
from relp_cli.jobs.grid import JobSpec
from relp_cli.methods.table import METHODS
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.registry import Registry
from relp_cli.spaces.table import SPACES
from relp_cli.tasks.files import FORMS, Form
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.spec import TaskSpec

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
TOKENS: Schema = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "array", "items": {"type": "integer", "minimum": 0}}]
}


def schema(what: str) -> Schema:
    """The schema of a sort of file. Raises: RelpError for one that there is none of."""
    return {"$schema": DIALECT, **SCHEMAS[what](), "title": f"relp {what}"}


def _task() -> Schema:
    made = TaskSpec.model_json_schema()
    made["properties"]["metric"] |= {"enum": list(METRICS)}
    slots = made["properties"]["slots"]
    slots["additionalProperties"] = {
        "anyOf": [{**TEXT, "description": "a word list's name"}, slots["additionalProperties"]]
    }
    return _with_include(made)


def _job() -> Schema:
    made = JobSpec.model_json_schema()
    properties = made["properties"]
    kinds = [*NODE_KINDS, *SPACES["edges"].kinds, *FEATURE_KINDS]
    for key, names in (
        ("tasks", list_configs("tasks")), ("models", ()), ("methods", METHODS), ("kinds", kinds), ("directions", ()),
        ("seeds", ()),
    ):  # fmt: skip
        properties[key]["minItems"] = 1
        if names:  # others are possible: files, `relp+ah`, `head+mlp_out`
            properties[key]["items"] = _some_of(names)
    for metric in (properties["metric"], made["$defs"]["EvaluateSpec"]["properties"]["metric"]):
        metric["anyOf"] = [{"enum": list(METRICS)}, {"type": "null"}]
    return _with_include(made)


def _pairs() -> Schema:
    records = [_record(form) for _, form in FORMS.items()]
    every = {"items": {"$ref": "#/$defs/record"}, "type": "array"}
    return {
        "description": "One line of a .jsonl file, or a .json file: a list of records, or an object with the list `prompts`.",
        "$defs": {"record": {"anyOf": records}},
        "anyOf": [
            {"$ref": "#/$defs/record"},
            every,
            {"type": "object", "properties": {"prompts": every}, "required": ["prompts"]},
        ],
    }


def _record(form: Form) -> Schema:
    texts = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}]}
    span = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
    known = {
        form.original: TOKENS if form.tokens else TEXT,
        form.patch: TOKENS if form.tokens else TEXT,
        form.answer: TOKENS if form.ids else texts,
        form.foil: TOKENS if form.ids else texts,
        "split": {"enum": ["discovery", "heldout"]},
        "join": TEXT,
        "roles": {"anyOf": [{"type": "array", "items": TEXT}, {"type": "object", "additionalProperties": span}]},
    }
    keys = form.required | form.optional
    others = {key for _, other in FORMS.items() for key in other.required | other.optional} - keys
    return {
        "title": form.name,
        "type": "object",
        "properties": {key: known[key] for key in known if key in keys} | dict.fromkeys(sorted(others), False),
        "required": sorted(form.required),
    }


def _with_include(made: Schema) -> Schema:
    """What is required may stand in a file that is included; a null there takes an included key away."""
    required, properties = made.pop("required"), made["properties"]
    for key, value in properties.items():
        if isinstance(below := value.get("additionalProperties"), dict):
            value["additionalProperties"] = _or_null(below)
        properties[key] = _or_null(value)
    properties["include"] = {
        "anyOf": [TEXT, {"type": "array", "items": TEXT}], "description": "YAML files whose values these are put over",
    }  # fmt: skip
    return made | {"anyOf": [{"required": required}, {"required": ["include"]}]}


def _or_null(value: Schema) -> Schema:
    kept: Schema = {key: value.pop(key) for key in ("description", "default", "title") if key in value}
    return {"anyOf": [value, {"type": "null"}], **kept}


def _some_of(names: Iterable[str]) -> Schema:
    """Any text; an editor offers these."""
    return {"anyOf": [{"enum": list(names)}, TEXT]}


SCHEMAS: Registry[Callable[[], Schema]] = Registry("schema")
for _name, _make in (("task", _task), ("job", _job), ("pairs", _pairs)):
    SCHEMAS.add(_name, _make)
