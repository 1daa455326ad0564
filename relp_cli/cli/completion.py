"""What a shell completes: names of the tables and shipped folders, and runs below the working folder. Imports no torch.

`COMPLETED` is keyed by parameter, or by verb and parameter where one name means several things. Lists are completed after their
last comma. Where nothing fits, the shell offers files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

Names = Callable[[], Iterable[str]]


def tasks() -> Iterable[str]:
    from relp_cli.tasks.spec import list_tasks

    return list_tasks()


def jobs() -> Iterable[str]:
    from relp_cli.config.paths import list_configs

    return list_configs("jobs")


def models() -> Iterable[str]:
    from relp_cli.models.catalog import embedded_names

    return embedded_names()


def methods() -> Iterable[str]:
    from relp_cli.methods.table import METHODS

    return METHODS


def kinds() -> Iterable[str]:
    from relp_cli.nodes.kinds import NODE_KINDS
    from relp_cli.spaces.table import SPACES

    return [*NODE_KINDS, *(row.kinds[0] for _, row in SPACES.items() if row.kinds)]


def metrics() -> Iterable[str]:
    from relp_cli.tasks.metrics import METRICS

    return METRICS


def ablations() -> Iterable[str]:
    from relp_cli.evaluation.ablation_table import ABLATIONS

    return ABLATIONS


def runs() -> Iterable[str]:
    from relp_cli.runs.folders import RUN, folders_holding

    return folders_holding(RUN)


def reported() -> Iterable[str]:
    from relp_cli.runs.folders import FOLDERS, RUN, folders_holding

    return folders_holding(RUN, *FOLDERS)


def of(*names: Names | tuple[str, ...]) -> Names:
    """All of these together."""
    return lambda: [name for part in names for name in (part if isinstance(part, tuple) else part())]


def lists() -> Iterable[str]:
    from relp_cli.cli.ls import LISTS

    return LISTS


def schemas() -> Iterable[str]:
    from relp_cli.outputs.schemas import SCHEMAS

    return SCHEMAS


COMPLETED: dict[str, Names] = {
    "task": tasks, "validate task": of(tasks, jobs), "show task": of(tasks, runs), "targets": of(tasks, runs),
    "target": of(runs, jobs, ("mib", "known_circuits")), "run": runs, "first": runs, "folders": reported,
    "model": models, "models": models, "method": methods, "methods": methods, "nodes": kinds, "metric": metrics,
    "ablation": ablations,
    "direction": of(("noising", "denoising")), "baseline": of(("patch", "zero", "mean")),
    "split": of(("discovery", "heldout", "all")), "unusable": of(("error", "drop")),
    "dtype": of(("float32", "float64", "bfloat16", "float16")), "device": of(("cpu", "cuda", "mps", "xpu")),
    "ls what": lists, "init what": of(("task", "job")), "schema what": schemas, "reproduce what": of(("table5", "figure3")),
}  # fmt: skip


def completing(verb: str, command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose arguments and options a shell can complete."""
    parameters = inspect.signature(command, eval_str=True).parameters
    for name, parameter in parameters.items():
        names = COMPLETED.get(f"{verb} {name}", COMPLETED.get(name))
        for info in getattr(parameter.annotation, "__metadata__", ()):
            if names is not None and getattr(info, "autocompletion", "") is None:
                info.autocompletion = _completer(names)
    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return command


def _completer(names: Names) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[Any]:
        before, comma, last = incomplete.rpartition(",")
        taken = set(before.split(","))
        return [before + comma + name for name in names() if name.startswith(last) and name not in taken]

    return complete
