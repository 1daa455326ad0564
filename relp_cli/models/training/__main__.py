"""`python -m relp_cli.models.training [--only NAME]`: make the embedded models."""

from __future__ import annotations

import argparse

from relp_cli.models.training.shapes import SHAPES
from relp_cli.models.training.train import make


def main() -> None:
    """Train the models one after the other and print what each one solves."""
    parser = argparse.ArgumentParser(prog="python -m relp_cli.models.training", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(SHAPES), help="train this model only (repeatable)")
    for name in parser.parse_args().only or SHAPES:
        card = make(name)
        for task, row in card["heldout"].items():
            print(f"{name}: {task}: held-out accuracy {row['accuracy']:.3f}, {row['metric']} {row['mean']:.2f}")


if __name__ == "__main__":
    main()
