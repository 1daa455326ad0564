"""Scoring runs: from a `ScoreSpec` to a run directory, resumed where it is done already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relp_cli import __version__
from relp_cli.errors import RelpError, RunFailed
from relp_cli.evaluation.behaviour import Behaviour, behaviour, keep_correct
from relp_cli.features.load import Dictionaries, check_dictionary, load_dictionaries
from relp_cli.files import check_writable
from relp_cli.methods.request import Progress, Request, check_memory
from relp_cli.methods.score import check_baseline, resolve_method
from relp_cli.methods.unfinished import Unfinished
from relp_cli.models.load import load_model
from relp_cli.models.model import Model
from relp_cli.models.placement import arguments
from relp_cli.runs.checked import score_spec
from relp_cli.runs.earlier import Say, quiet
from relp_cli.runs.pairs import pair_records, write_pairs
from relp_cli.runs.rundir import RunDir, checksum, provenance
from relp_cli.runs.scoring_notes import scoring_notes
from relp_cli.runs.spec import ScoreSpec
from relp_cli.scoring import score
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import space_for
from relp_cli.tasks.counted import sharing_note
from relp_cli.tasks.generate import AtMost
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.shared import PROMPT_OF, prompts_of
from relp_cli.tasks.task import Task, load_task


@dataclass
class Session:
    """Models and tasks that are loaded already; a batch job scores many cells on few of them.

    place: `placement.placed`. say: is told what takes its time before there is progress to report. at_most: where there are
    fewer pairs than a spec says, take these (None: of files alone, which hold what they hold).
    """

    place: str | None = None
    models: dict[tuple[str, str], Model] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    saes: dict[tuple[str, str, str], Dictionaries] = field(default_factory=dict)
    say: Say = quiet
    at_most: bool | None = None

    @property
    def takes_fewer(self) -> bool:
        """Whether held-out pairs may be fewer than asked."""
        return self.at_most is not False

    def model(self, name: str, dtype: str = "float32") -> Model:
        if (name, dtype) not in self.models:
            self.say(f"loading {name} …")
            self.models[name, dtype] = load_model(name, dtype=dtype, **arguments(self.place))
        return self.models[name, dtype]

    def forget(self) -> None:
        """Let go of models and what was loaded for them: the next ones are others."""
        self.models.clear()
        self.saes.clear()

    def dictionaries(self, path: str, model: Model) -> Dictionaries:
        """The sparse autoencoders of a folder, or shipped ones, for a model."""
        key = (path, model.name, str(model.dtype))
        if key not in self.saes:
            self.saes[key] = load_dictionaries(path, model)
        return self.saes[key]

    def task(self, name: str) -> Task:
        if name not in self.tasks:
            self.tasks[name] = load_task(name)
        return self.tasks[name]


@dataclass(frozen=True)
class Drawn:
    """Pairs of one task, tokenised for one model."""

    model: Model
    task: Task
    pairs: list[PairBatch]
    metric: str
    bos: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prepared(Drawn):
    """And what the model does on them."""

    behaviour: Behaviour


def draw(spec: ScoreSpec, session: Session, at_most: bool = False) -> Drawn:
    """Load, draw and tokenise pairs; `spec.only_correct` is not looked at.

    at_most: take what there is where the split holds fewer than `spec.pairs`, and say so in `notes` (`Session.at_most` too).
    Raises: RelpError for fewer pairs else.
    """
    task = session.task(spec.task).with_ids_of(spec.ids_of)
    task.foreign()  # bad tasks, and tokenizers that are not there, are found before a model is loaded
    metric = task.metric if spec.metric is None else spec.metric
    METRICS[metric]
    model = session.model(spec.model, spec.dtype)
    unasked = bool(task.fixed) if session.at_most is None else session.at_most
    n = AtMost(spec.pairs) if at_most or unasked else spec.pairs
    built = task.build(model, n, spec.seed, spec.split, spec.bos, spec.unusable, metric)
    return Drawn(model, task, built.batches, metric, built.bos, built.notes)


def prepare(spec: ScoreSpec, session: Session, at_most: bool = False) -> Prepared:
    """`draw`, and run the model on the pairs."""
    drawn = draw(spec, session, at_most)
    model, task, pairs, metric, notes = drawn.model, drawn.task, drawn.pairs, drawn.metric, list(drawn.notes)
    session.say(f"running {model.name} on {sum(map(len, pairs))} pairs of {task.name} …")
    seen = behaviour(model, pairs, metric)
    if said := seen.note(model.name, task.name):  # of all pairs: those that it gets right say nothing
        notes.append(said)
    if spec.only_correct:
        kept = keep_correct(pairs, seen)
        notes.append(f"only correct: {sum(len(b) for b in kept)} of {seen.n} pairs kept")
        pairs, seen = kept, behaviour(model, kept, metric)
    if said := sharing_note(prompts_of(pairs)):
        notes.append(said)
    return Prepared(model, task, pairs, metric, drawn.bos, tuple(notes), seen)


def check_request(spec: ScoreSpec, folder: Path | None = None) -> None:
    """What can be known to be wrong before anything is loaded: method, its parameters and rules, the output folder."""
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise RelpError(f"--output {folder} is a file; expected a folder")
        check_writable(folder)
    space = space_for(spec.nodes)
    if "dictionary" in spec.params and "dictionary" not in space.options:
        raise RelpError("--dictionary is for features (--nodes feature)")
    given = {k: v for k, v in spec.params.items() if k not in space.options}
    row, params = resolve_method(spec.method, given, space.name)
    request = Request(direction=spec.direction, baseline=spec.baseline, batch_size=spec.batch_size, memory=spec.memory)
    check_baseline(row, space, request)
    check_memory(row, params, spec.method, request)
    if "dictionary" in space.options:
        check_dictionary(spec.params.get("dictionary"))
    if spec.metric is not None:
        METRICS[spec.metric]
    if spec.params.get("start") is not None:
        _start_of(spec)


def _start_of(spec: ScoreSpec) -> str:
    """The checksum of the scores that a learned ranking starts from. Raises RelpError where they are not of these nodes."""
    start = RunDir(Path(spec.params["start"]))
    nodes = start.read()["spec"].get("nodes") or []
    if missing := [name for name in spec.nodes if name not in nodes]:
        raise RelpError(f"--start {start.path}: this run scored {', '.join(nodes)}, not {missing[0]}")
    return checksum(start.scores)


def digest_of(spec: ScoreSpec, prepared: Prepared, session: Session) -> str:
    """The content hash of a run: its spec, and what the names in it stand for."""
    more = {"start_scores": _start_of(spec)} if spec.params.get("start") is not None else {}
    return spec.digest(**_contents(spec, prepared, session), **more, metric_used=prepared.metric, relp=__version__)


def _contents(spec: ScoreSpec, prepared: Prepared, session: Session) -> dict[str, str]:
    """Hashes of what a run's names stand for, as the scores' metadata has them."""
    where = spec.params.get("dictionary")
    more = {"dictionary_hash": session.dictionaries(where, prepared.model).digest} if where else {}
    return {"task_hash": prepared.task.hash, "revision": prepared.model.revision, **more}


def default_folder(spec: ScoreSpec, digest: str, root: Path = Path("runs")) -> Path:
    """runs/<task>-<model>-<method>-<hash>."""
    names = [Path(spec.task).stem, Path(spec.model).name, spec.method.replace("+", "_")]
    return root / "-".join([*names, digest[:8]])


def score_run(
    spec: ScoreSpec,
    session: Session,
    folder: Path | None = None,
    progress: Progress | None = None,
    on_ready: Callable[[Prepared], None] | None = None,
    prepared: Prepared | None = None,
) -> tuple[RunDir, Scores, bool]:
    """Score and write a run directory; returns it, its scores, and whether they were there already.

    prepared: the pairs of this spec, where they are drawn already (methods of one comparison or job group share them).
    Raises: RelpError for bad input (before anything is written), RunFailed where writing fails.
    """
    check_request(spec, folder)
    prepared = prepared or prepare(spec, session)
    digest = digest_of(spec, prepared, session)
    run = RunDir(folder or default_folder(spec, digest))
    if on_ready:
        on_ready(prepared)
    if run.is_done(digest):
        return run, load_scores(run, run.read()), True
    check_writable(run.path)
    unfinished = Unfinished(run.unfinished, digest)
    scores = score(
        prepared.model,
        prepared.pairs,
        spec.method,
        spec.nodes,
        prepared.metric,
        spec.direction,
        spec.baseline,
        spec.batch_size,
        spec.keep_examples,
        progress,
        unfinished,
        spec.memory,
        **loaded_params(spec, prepared, session),
    )
    unfinished.drop()
    scores = with_meta(scores, prepared, spec, digest)
    scores.save(run.scores)
    write_pairs(run, pair_records(prepared.model.tokenizer, prepared.pairs, prepared.behaviour, prepared.metric))
    run.write(
        {
            "hash": digest,
            "spec": spec.model_dump(mode="json"),
            "scores": {key: value for key, value in scores.meta.items() if key != PROMPT_OF},
            "behaviour": prepared.behaviour.as_dict(),
            "notes": [*prepared.notes, *scoring_notes(scores)],
            "provenance": provenance(),
        }
    )
    unfinished.clear()
    return run, scores, False


def scored_below(
    root: Path, spec: ScoreSpec, prepared: Prepared, session: Session, progress: Progress | None = None
) -> tuple[RunDir, Scores]:
    """`score_run` of pairs that are drawn already, in a folder of its own below `root`: the next one takes it from there."""
    folder = default_folder(spec, digest_of(spec, prepared, session), root)
    return score_run(spec, session, folder, progress, prepared=prepared)[:2]


def loaded_params(spec: ScoreSpec, prepared: Drawn, session: Session) -> dict[str, Any]:
    """The spec's parameters as `score` takes them: dictionaries loaded."""
    params = dict(spec.params)
    if "dictionary" in params:
        params["dictionary"] = session.dictionaries(params["dictionary"], prepared.model)
    return params


def with_meta(scores: Scores, prepared: Prepared, spec: ScoreSpec, digest: str) -> Scores:
    """The scores with their task, its hash, the seed and the BOS choice in their metadata."""
    from dataclasses import replace

    meta = {
        **scores.meta,
        "task": prepared.task.name,
        "task_hash": prepared.task.hash,
        "seed": spec.seed,
        "split": spec.split,
        "bos": prepared.bos,
        "hash": digest,
    }
    return replace(scores, meta=meta)


def load_scores(run: RunDir, record: dict[str, Any]) -> Scores:
    """The scores that a run's record is of.

    Raises: RelpError where they are missing or cannot be opened, RunFailed where they are damaged, were edited, or are
    another run's.
    """
    if not run.scores.is_file():
        raise RelpError(f"run '{run.path}' has no scores; run `relp score` again")
    found = checksum(run.scores)
    scores = Scores.load(run.scores)
    if found != record["files"].get(run.scores.name) or scores.meta.get("hash") != record["hash"]:
        raise RunFailed(
            f"score file {run.scores} is not the one that this run wrote (its checksum or hash is not run.json's); "
            "score again to replace it"
        )
    if list(scores) != record["spec"].get("nodes"):
        raise RunFailed(f"run record {run.record}: nodes {record['spec'].get('nodes')}, but scores of {list(scores)}")
    return scores


def open_run(path: Path) -> tuple[RunDir, ScoreSpec, Scores]:
    """A finished run. Raises RelpError for what is no run, RunFailed for damaged, edited or exchanged scores."""
    run = RunDir(path)
    record = run.read()
    scores = load_scores(run, record)
    return run, score_spec(f"run record {run.record}: ", **record["spec"]), scores


def prepare_again(
    spec: ScoreSpec, scores: Scores, session: Session, at_most: bool = True, same_task: bool = True
) -> Prepared:
    """`prepare` for a run that exists, whose own pairs are as many as there were; `spec` may ask for other pairs of its task, or,
    unless `same_task`, for another task.

    Raises: RelpError where the task, the model, its tokenizer or the dictionaries are no longer those that were scored.
    """
    prepared = prepare(spec, session, at_most)
    for what, now in _contents(spec, prepared, session).items():
        if what == "task_hash" and not same_task:
            continue
        then = scores.meta.get(what)
        if then != now:
            name = {"task_hash": f"task '{spec.task}'", "revision": f"model '{spec.model}'"}.get(
                what, "the dictionaries"
            )
            raise RelpError(
                f"{name}: the content has changed since this run was scored ({what} {now}, then {then}); score again"
            )
    return prepared
