"""What folders hold, and what is said of a name that stands for nothing, or for another thing than the verb takes. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from relp_cli.config.paths import list_configs
from relp_cli.errors import RelpError, near
from relp_cli.tasks.source import check_source
from relp_cli.tasks.spec import list_tasks

RUN = "run.json"
# A file that only such a folder has → what the folder is, besides a run: what `relp report` takes.
FOLDERS = {"compare.csv": "a comparison", "diagnosis.json": "a diagnosis", "results.csv": "a job"}
ALL = {RUN: "a run", **FOLDERS, "job.json": "a job"}  # job.json: of one without tables yet
VERBS = {"a run": ("show", "report"), "a job": ("collect", "report")}  # what takes such a folder, besides `report`
DEEP = 3  # folders below the working one that are looked through


def folders_holding(*files: str) -> list[str]:
    """The folders below the working one that hold one of these files."""
    patterns = ("/".join(["*"] * depth + [file]) for depth in range(1, DEEP + 1) for file in files)
    return sorted({str(path.parent) for pattern in patterns for path in Path().glob(pattern)})


def what_is(folder: Path) -> str:
    """ "a run", "a job" …; "" for a folder of something else, and for what is none."""
    return next((what for file, what in ALL.items() if (folder / file).is_file()), "")


def taken_by(folder: Path) -> str:
    """Which verbs take a folder of results, as the end of a sentence."""
    verbs = VERBS.get(what_is(folder), ("report",))
    return f" ({' or '.join(f'`relp {verb} {folder}`' for verb in verbs)} takes it)"


def instead(folder: Path) -> str:
    """What the folder is and which verbs take it, as the end of a sentence; "" where it is nothing of ours."""
    return f"; it is {what}'s folder{taken_by(folder)}" if (what := what_is(folder)) else ""


def meant(name: str, folders: Iterable[str], names: Iterable[str] = ()) -> str:
    """`"; did you mean 'x' or 'y'?"`: the folder whose last part is most like that of `name`, and the name most like it."""
    by_last = {Path(folder).name: folder for folder in folders}
    found = [by_last.get(near(Path(name).name, by_last) or ""), near(name, names)]
    likely = [repr(one) for one in dict.fromkeys(found) if one is not None]
    return f"; did you mean {' or '.join(likely)}?" if likely else ""


def near_runs(name: str) -> str:
    """`meant` of the runs below the working folder."""
    return meant(name, folders_holding(RUN))


def check_job_name(name: str, place: str, *files: str) -> None:
    """Raises RelpError for a name without a job's ending that is no folder and no shipped job's. place: what folder was expected,
    which holds one of the files.
    """
    jobs = list_configs("jobs")
    if name not in jobs and not name.endswith((".yaml", ".yml")) and not Path(name).exists():
        like = meant(name, folders_holding(*files), jobs)
        raise RelpError(
            f"'{name}' is neither {place} nor a job{like or '; `relp ls runs` and `relp ls jobs` list them'}"
        )


def check_task(name: str, runs: bool = False) -> None:
    """What can be known to be wrong of a task's name or file without torch, before it is imported.

    runs: whether a run's folder could have been meant as well.
    Raises: RelpError, as `read_source`; for a name that is nothing; and for a folder that holds results.
    """
    path = Path(name)
    if name and name not in list_tasks() and (what := what_is(path)):
        raise RelpError(f"'{name}' is {what}'s folder; expected a task, a task YAML or a file of pairs{taken_by(path)}")
    if ("/" in name or runs) and not path.suffix and not path.exists() and name not in list_tasks():
        like = meant(name, folders_holding(RUN) if runs else (), list_tasks())
        place = "a task, a file of pairs nor a run's folder" if runs else "a task nor a file or folder of pairs"
        raise RelpError(f"'{name}' is neither {place}{like or '; `relp ls tasks` lists tasks'}")
    check_source(name)


def check_valid(name: str) -> None:
    """Raises RelpError for what `relp validate` is given that is neither a task's nor a job's name, nor a file."""
    path = Path(name)
    if name and (what := what_is(path)):
        raise RelpError(f"'{name}' is {what}'s folder; expected a task, a file of pairs or a job{taken_by(path)}")
    if name not in list_tasks() and "/" not in name and not path.suffix and not path.exists():
        raise RelpError(f"unknown task or job '{name}'{meant(name, (), [*list_tasks(), *list_configs('jobs')])}")


def check_compared(names: Sequence[str]) -> bool:
    """Whether these are runs; else they are tasks. Raises RelpError where they are neither, or some of both."""
    runs = [name for name in names if what_is(Path(name)) == "a run"]
    others = [name for name in names if name not in runs]
    if not runs:
        for name in others:
            check_task(name, runs=True)
    if others and runs:
        like = meant(others[0], {*folders_holding(RUN)} - {*names})
        raise RelpError(f"'{runs[0]}' is a run and '{others[0]}' is none{like or '; expected runs, or tasks'}")
    return bool(runs)


def check_reported(folders: Sequence[Path]) -> None:
    """Raises RelpError for what `relp report` is given that does not exist."""
    for path in folders:
        if not path.exists():
            like = meant(str(path), folders_holding(RUN, *FOLDERS))
            raise RelpError(f"run '{path}' does not exist, nor a comparison, job or diagnosis of that name{like}")
