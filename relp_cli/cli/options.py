"""Options that several verbs share: the fields of a dataclass are options of every command that `takes` it.

Imports no torch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, get_type_hints

import typer

from relp_cli import BATCH_SIZE
from relp_cli.cli.common import (
    BosOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    IdsOfOption,
    MemoryOption,
    UnusableOption,
    assignments,
    comma,
    count_option,
    seed_option,
)
from relp_cli.config.memory import bytes_of
from relp_cli.models.placement import placed


@dataclass(frozen=True)
class PairOptions:
    """Which pairs of a task are run, how, and what is measured on them."""

    pairs: Annotated[int, count_option(1, help="How many prompt pairs (by default as many as exist, at most).")] = 100
    seed: Annotated[int, seed_option(help="Draws the pairs, and whatever else is drawn.")] = 0
    split: Annotated[str, typer.Option(help="discovery, heldout or all.")] = "discovery"
    metric: Annotated[
        str | None, typer.Option(help="logit_diff, prob_diff, answer_logprob, kl (default: the task's).")
    ] = None
    direction: Annotated[str, typer.Option(help="noising (run the original) or denoising.")] = "noising"
    bos: BosOption = None
    only_correct: Annotated[bool, typer.Option("--only-correct", help="Keep pairs that the model gets right.")] = False
    unusable: UnusableOption = None
    ids_of: IdsOfOption = None
    dtype: DtypeOption = "float32"
    device: DeviceOption = None
    device_map: DeviceMapOption = None

    @property
    def place(self) -> str | None:
        """The device or the device map. Raises RelpError for both."""
        return placed(self.device, self.device_map)

    @property
    def of_spec(self) -> dict[str, Any]:
        """What a `ScoreSpec` knows of these options, under its names."""
        names = ("pairs", "seed", "split", "metric", "direction", "bos", "only_correct", "unusable", "ids_of", "dtype")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ScoringOptions(PairOptions):
    """`PairOptions`, and how units are scored."""

    baseline: Annotated[str, typer.Option(help="patch, zero or mean: what n(x_p) is.")] = "patch"
    dictionary: Annotated[
        str | None,
        typer.Option(help="Score features (nodes=feature) of these sparse autoencoders: a folder, or tiny-pythia."),
    ] = None
    rules: Annotated[str | None, typer.Option(help="LRP rules, comma-separated (default: the family's preset).")] = None
    settings: Annotated[list[str], typer.Option("--set", help="A parameter of the method: --set steps=20")] = field(
        default_factory=list
    )
    batch_size: Annotated[int, count_option(1, help="Pairs per pass (32: cut to what memory is worth).")] = BATCH_SIZE

    @property
    def of_spec(self) -> dict[str, Any]:
        return super().of_spec | {"baseline": self.baseline, "batch_size": self.batch_size}

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of methods and spaces: `--set`, `--rules` and `--dictionary` under one roof."""
        params: dict[str, Any] = assignments(self.settings)
        if self.rules is not None:
            params["rules"] = self.rules if self.rules == "auto" else list(comma(self.rules, "--rules"))
        if self.dictionary is not None:
            params["dictionary"] = self.dictionary
        return params


@dataclass(frozen=True)
class BoundedOptions(ScoringOptions):
    """`ScoringOptions` of verbs that can be told how much memory to take."""

    memory: MemoryOption = None

    @property
    def of_spec(self) -> dict[str, Any]:
        return super().of_spec | {"memory": None if self.memory is None else bytes_of(self.memory, "--memory")}


def takes(options: type, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function whose first parameter is of the dataclass `options`: on the command line its fields
    stand behind the function's own parameters. defaults: of fields, where this command has others.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(options, include_extras=True)
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f, defaults), annotation=hints[f.name]
            )
            for f in fields(options)
        ]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(options(**{f.name: given.pop(f.name) for f in fields(options)}), **given)

        both = [*own, *shared]
        run.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in both}
        return run

    return wrap


def _default(f: Any, defaults: dict[str, Any]) -> Any:
    if f.name in defaults:
        return defaults[f.name]
    return f.default if f.default is not MISSING else f.default_factory()
