"""What can be known to be wrong with a job before any of its cells runs."""

from __future__ import annotations

import itertools
from pathlib import Path

from relp_cli.errors import RelpError, unknown
from relp_cli.evaluation.ablation_table import ablation_row
from relp_cli.jobs.grid import JobSpec, cells, nodes_of, score_spec_of
from relp_cli.jobs.known import Known
from relp_cli.methods.table import row_of
from relp_cli.models.folder import local_path, split_revision
from relp_cli.models.load import DTYPES
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.runs.checked import distinct, model_labels
from relp_cli.runs.scoring import check_request
from relp_cli.spaces.table import space_for
from relp_cli.studies.evaluating import sweep_points
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.task import load_task


def check_job(job: JobSpec, folder: Path | None = None, elsewhere: bool = False) -> None:
    """What can be known to be wrong before any cell runs: tasks, methods, their parameters and rules, dictionaries,
    ablations, metrics, the sweep, and models that are there twice. One model of several that does not load fails
    in its own cells. folder: the job's; models that were loaded for it once need not be there any more. elsewhere: models
    are loaded on other machines, and may be there only.

    Raises: RelpError for what no cell could be computed with.
    """
    model_labels(job.models)
    wrong = [problem for model in job.models if (problem := _no_model(model)) is not None]
    known = folder and Known(job, folder)
    if not elsewhere and len(wrong) == len(job.models) and not (known and any(map(known.revision, job.models))):
        raise wrong[0]
    distinct("task name", [load_task(task).name for task in job.tasks])
    methods = [*job.methods, *([job.agreement.reference] if job.agreement else [])]
    group = cells(job)[0].group
    for method, kind in itertools.product(methods, job.kinds):
        check_request(score_spec_of(job, group, method, kind))
    if job.dtype not in DTYPES:
        raise unknown("dtype", job.dtype, DTYPES)
    if any(by_candidates(job, method, kind) for method, kind in itertools.product(methods, job.kinds)):
        cheap_methods(job)
        if job.memory is not None:
            raise RelpError("exact_candidates chooses its own passes: give `batch_size` in place of `memory`")
        if job.baseline != "patch":
            raise RelpError(
                f"exact_candidates patches with the patch prompts' values; this job has baseline '{job.baseline}'"
            )
    if job.evaluate is not None:
        sweep_points(job.evaluate.sweep)
        if job.evaluate.metric is not None:
            METRICS[job.evaluate.metric]
        for kind in job.kinds:
            ablation_row(job.evaluate.ablation, space_for(nodes_of(kind)).name)
            if job.evaluate.ablation == "corpus":
                raise RelpError(
                    "ablation 'corpus' needs a text file, which a job cannot give; use `relp evaluate RUN --corpus`"
                )


def _no_model(name: str) -> RelpError | None:
    try:
        local_path(split_revision(name, None)[0])
    except RelpError as error:
        return error
    return None


def by_candidates(job: JobSpec, method: str, kind: str) -> bool:
    """Whether a method of a job scores only candidates of this kind: exact patching of neurons and dimensions."""
    exact = method == "act_patch" and job.exact_candidates is not None
    return exact and kind in NODE_KINDS and NODE_KINDS[kind].split == "unit"


def cheap_methods(job: JobSpec) -> list[str]:
    """The methods that choose candidates for exact patching. Raises RelpError where there is none."""
    cheap = [m for m in job.methods if m != "act_patch" and row_of(m).signed]
    if not cheap:
        raise RelpError("exact_candidates needs at least one signed method besides act_patch to choose them")
    return cheap
