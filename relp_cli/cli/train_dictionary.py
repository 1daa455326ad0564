"""relp train-dictionary"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import (
    DeviceMapOption,
    DeviceOption,
    DryRunFlag,
    JsonFlag,
    RevisionOption,
    at_revision,
    comma,
    count_option,
    log,
    out,
    output_option,
    print_fields,
    print_json,
    progress,
    seed_option,
)
from relp_cli.models.placement import arguments, placed


def command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Embedded name, local folder, or hub name.")
    ] = "tiny-pythia",
    revision: RevisionOption = None,
    sites: Annotated[str, typer.Option(help="all, or names: embed,resid_out_layer0,mlp_out_layer1")] = "all",
    architecture: Annotated[str, typer.Option(help="topk, or standard (ReLU with an L1 penalty).")] = "topk",
    features: Annotated[int, count_option(1, help="Features per dictionary.")] = 512,
    k: Annotated[int, count_option(1, help="Active features (topk).")] = 8,
    l1: Annotated[float, typer.Option(help="Sparsity penalty (standard).")] = 0.05,
    steps: Annotated[int, count_option(1, help="Training steps per site.")] = 2000,
    batch: Annotated[int, count_option(1, help="Positions per step.")] = 512,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 2e-3,
    seed: Annotated[int, seed_option(help="Initial weights and batches.")] = 0,
    text: Annotated[
        Path | None, typer.Option(help="A text file, one text per line (default: sentences of the tasks).")
    ] = None,
    lines: Annotated[int, count_option(1, help="How many lines; every tenth is held out.")] = 8000,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    output: Annotated[Path, output_option(help="Folder: one SAELens folder per site.")] = Path("dictionaries"),
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train small sparse autoencoders on a model's activations, for --dictionary.

    Example: relp train-dictionary --model tiny-pythia --sites resid_out_layer2 -o my-dictionaries
    """
    from relp_cli.features.train import TrainSpec, enough
    from relp_cli.features.trainset import read_card, read_lines, task_lines, train_dictionaries, training_cost
    from relp_cli.files import check_writable
    from relp_cli.models.load import load_model
    from relp_cli.spaces.sites import all_sites, must_be_site, site_of

    spec = TrainSpec.of(
        architecture=architecture, features=features, k=k, l1=l1, steps=steps, batch=batch, lr=lr, seed=seed
    )
    names = [] if sites == "all" else comma(sites, "--sites")
    for name in names:  # what is wrong without a model is said before one is loaded
        must_be_site(name)
    enough(lines, ": --lines")
    read_card(output)
    check_writable(output)
    given = None if text is None else read_lines(text, lines)
    loaded = load_model(at_revision(model, revision), **arguments(placed(device, device_map)))
    material = task_lines(lines) if given is None else given
    wanted = [site_of(name, loaded) for name in names] or all_sites(loaded)
    if dry_run:
        cost = training_cost(loaded, material, wanted, spec)
        print_json(cost) if json else print_fields(cost)
        return
    with progress() as bar:
        table = train_dictionaries(loaded, material, wanted, spec, output, bar)
    if json:
        print_json({"folder": str(output), "sites": table.to_dict("records")})
        return
    from relp_cli.report.tables import show

    show(table, out, f"{architecture} dictionaries of {model}, on held-out text")
    log.print(str(output))
