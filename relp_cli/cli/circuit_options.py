"""What `relp circuit` takes besides its run: options, and what of them goes together. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from relp_cli.cli.common import DeviceMapOption, DeviceOption, JsonFlag, count_option, output_option
from relp_cli.errors import RelpError
from relp_cli.models.placement import placed


@dataclass(frozen=True)
class CircuitOptions:
    """How a circuit is selected, what is done with it, and where it goes."""

    threshold: Annotated[float | None, typer.Option("--threshold", "-t", help="Keep |score| > τ.")] = None
    fraction: Annotated[float | None, typer.Option(help="τ as a fraction of mean |L(x_o)| (0.005: Transluce).")] = None
    top_k: Annotated[int | None, count_option(0, help="Keep the k largest |score|.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the fewest nodes that hold this share of Σ|score|.")] = None
    nodes: Annotated[str | None, typer.Option(help="Only these kinds (default: all that were scored, together).")] = (
        None
    )
    sign: Annotated[str, typer.Option(help="absolute, positive or negative.")] = "absolute"
    signed: Annotated[
        bool, typer.Option("--signed", help="Rank from support to opposition, not by |score| (MIB's --signed).")
    ] = False
    aggregate: Annotated[str, typer.Option(help="none (per position) or sum (over positions).")] = "none"
    union: Annotated[bool, typer.Option(help="Keep what passes for any example, not on average.")] = False
    greedy: Annotated[bool, typer.Option(help="Edges: grow from the logits (with --top-k or --threshold).")] = False
    prune: Annotated[
        str | None, typer.Option(help="Edges: none, dangling, or from_input (exact for counterfactual ablation only).")
    ] = None
    connected: Annotated[
        bool, typer.Option("--connected", help="Edges: the best --top-k that lie on paths from input to logits (ILP).")
    ] = False
    average: Annotated[
        list[str], typer.Option(help="Another run, whose ranks are averaged with this one's (may be repeated).")
    ] = field(default_factory=list)
    stable_signs: Annotated[
        float | None,
        typer.Option(help="Only units whose sign is the same in this share of bootstrap resamples of the pairs (.95)."),
    ] = None
    verify: Annotated[bool, typer.Option(help="Patch the selected nodes exactly and keep those it confirms.")] = False
    confirm: Annotated[
        float | None, typer.Option(help="--verify keeps |exact effect| > this (default: the selection's τ).")
    ] = None
    resamples: Annotated[
        int, count_option(0, "--stability", help="Select again from that many bootstrap resamples of the pairs.")
    ] = 0
    clusters: Annotated[
        str | None,
        typer.Option(help="auto or K: group the pairs by their scores, a circuit per group (without positions)."),
    ] = None
    errors: Annotated[
        str | None, typer.Option(help="Error terms of feature circuits: all, residual (not of attention, MLP), none.")
    ] = None
    edge_threshold: Annotated[
        float | None,
        typer.Option(
            "--edge-threshold", "-e", help="Feature circuits: score edges between nodes, keep |score| > this."
        ),
    ] = None
    annotations: Annotated[
        Path | None, typer.Option(help="What features mean: JSON lines (default: contexts and promoted tokens).")
    ] = None
    listing: Annotated[
        bool,
        typer.Option("--list", help="Print every node or edge of the circuit with its score; alone: of circuit.json."),
    ] = False
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Let a circuit of nothing replace a file that is there.")
    ] = False
    device: DeviceOption = None
    device_map: DeviceMapOption = None
    output: Annotated[Path | None, output_option(help="Default: circuit.json in the run.")] = None
    json: JsonFlag = False

    @property
    def how(self) -> dict[str, Any]:
        """The ways of selecting, of which one is given, or none."""
        return {"threshold": self.threshold, "fraction": self.fraction, "top_k": self.top_k, "top_p": self.top_p}

    @property
    def undecided(self) -> bool:
        """Whether no way of selecting is given."""
        return all(value is None for value in self.how.values())

    @property
    def refined(self) -> bool:
        """Whether other scores than the run's own are selected from."""
        return bool(self.average) or self.stable_signs is not None

    @property
    def ranked_by(self) -> str:
        """`--sign`, and `--signed`, as selection takes them."""
        return "signed" if self.signed else self.sign

    @property
    def of_space(self) -> dict[str, Any]:
        """What selection takes for edges or features alone."""
        flags = {"greedy": self.greedy or None, "connected": self.connected or None}
        given = {"errors": self.errors, **flags, "prune": self.prune}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def plain(self) -> bool:
        """Whether units are selected as an evaluation's sweep does."""
        return not (
            self.refined or self.union or self.of_space or (self.ranked_by, self.aggregate) != ("absolute", "none")
        )

    def check(self) -> str | None:
        """The device or the device map. Raises RelpError for numbers that are none, options that do not go together or lack the
        one that they belong to, and annotations that cannot be read.
        """
        if self.signed and self.sign != "absolute":
            raise RelpError(f"give --signed or --sign {self.sign}, not both")
        self._check_confirmation()
        self._check_edges()
        if self.clusters is not None:
            self._check_clusters(self.clusters)
        if self.refined:
            self._check_refining()
        return placed(self.device, self.device_map)

    def _check_confirmation(self) -> None:
        if self.confirm is not None and not self.verify:
            raise RelpError("--confirm belongs to --verify")
        if self.confirm is not None and not 0 <= self.confirm < math.inf:
            raise RelpError(f"--confirm: expected a number from 0 up, got {self.confirm}")

    def _check_edges(self) -> None:
        if self.annotations is not None:
            from relp_cli.features.annotations import read_annotations

            if self.edge_threshold is None:
                raise RelpError("--annotations belongs to --edge-threshold")
            read_annotations(self.annotations)
        if self.edge_threshold is not None and not math.isfinite(self.edge_threshold):
            raise RelpError(f"--edge-threshold: expected a number, got {self.edge_threshold}")

    def _check_clusters(self, asked: str) -> None:
        from relp_cli.studies.clustering import clusters_asked

        clusters_asked(asked)
        of_one_circuit = {
            "--average": self.average, "--stable-signs": self.stable_signs is not None, "--verify": self.verify,
            "--union": self.union, "--stability": self.resamples, "--edge-threshold": self.edge_threshold is not None,
        }  # fmt: skip
        for name in (name for name, given in of_one_circuit.items() if given):
            raise RelpError(f"{name} is for one circuit; --clusters makes one for each cluster")

    def _check_refining(self) -> None:
        option = "--average" if self.average else "--stable-signs"
        for name, given in (("--union", self.union), ("--stability", self.resamples)):
            if given:
                raise RelpError(f"{option} selects from means over pairs, {name} from single pairs; give one of them")
        for name, value in (("--fraction", self.fraction), ("--top-p", self.top_p)):
            if self.average and value is not None:
                raise RelpError(
                    f"{name} is of the sizes of scores; --average ranks them: --top-k, or --threshold (a share of ranks)"
                )
        if self.average and self.verify and self.confirm is None:
            raise RelpError("--verify with --average needs --confirm: the threshold is one of ranks, not of effects")
        if self.stable_signs is not None and not 0.5 < self.stable_signs <= 1:
            raise RelpError(f"--stable-signs: expected a share above 0.5 and up to 1, got {self.stable_signs:g}")
