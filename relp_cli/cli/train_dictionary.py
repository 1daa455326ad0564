"""relp train-dictionary"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import (
    DeviceOption,
    JsonFlag,
    RevisionOption,
    at_revision,
    comma,
    log,
    out,
    output_option,
    print_json,
    progress,
)


def command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded name, local folder, or hub name.")
    ] = "tiny-pythia",
    revision: RevisionOption = None,
    sites: Annotated[str, typer.Option(help="all, or names: embed,resid_out_layer0,mlp_out_layer1")] = "all",
    architecture: Annotated[str, typer.Option(help="topk, or standard (ReLU with an L1 penalty).")] = "topk",
    features: Annotated[int, typer.Option(help="Features per dictionary.")] = 512,
    k: Annotated[int, typer.Option(help="Active features (topk).")] = 8,
    l1: Annotated[float, typer.Option(help="Sparsity penalty (standard).")] = 0.05,
    steps: Annotated[int, typer.Option(help="Training steps per site.")] = 2000,
    batch: Annotated[int, typer.Option(help="Positions per step.")] = 512,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Initial weights and batches.")] = 0,
    text: Annotated[
        Path | None, typer.Option(help="A text file, one text per line (default: sentences of the tasks).")
    ] = None,
    lines: Annotated[int, typer.Option(help="How many lines; every tenth is held out.")] = 8000,
    device: DeviceOption = None,
    output: Annotated[Path, output_option(help="Folder: one SAELens folder per site.")] = Path("dictionaries"),
    json: JsonFlag = False,
) -> None:
    """Train small sparse autoencoders on a model's activations, for --dictionary.

    Example: relp train-dictionary --model tiny-pythia --sites resid_out_layer2 -o my-dictionaries
    """
    from pydantic import ValidationError

    from relp_cli.errors import RelpError
    from relp_cli.features.sites import all_sites, site_of
    from relp_cli.features.train import TrainSpec
    from relp_cli.features.trainset import read_lines, task_lines, train_dictionaries
    from relp_cli.models.load import load_model

    try:
        spec = TrainSpec(
            architecture=architecture, features=features, k=k, l1=l1, steps=steps, batch=batch, lr=lr, seed=seed  # type: ignore[arg-type]
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        raise RelpError(f"--{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from error
    loaded = load_model(at_revision(model, revision), device=device)
    wanted = all_sites(loaded) if sites == "all" else [site_of(name, loaded) for name in comma(sites)]
    material = read_lines(text, lines) if text else task_lines(lines)
    with progress() as bar:
        table = train_dictionaries(loaded, material, wanted, spec, output, bar)
    if json:
        print_json({"folder": str(output), "sites": table.to_dict("records")})
        return
    from relp_cli.report.tables import show

    show(table, out, f"{architecture} dictionaries of {model}, on held-out text")
    log.print(str(output))
