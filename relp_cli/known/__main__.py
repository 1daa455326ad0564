"""`python -m relp_cli.known make [NAME ...]`: make the cases that ship."""

from __future__ import annotations

import argparse

from relp_cli.known.make import MAKERS


def main() -> None:
    """Make the cases one after the other and say how large their circuits are."""
    parser = argparse.ArgumentParser(prog="python -m relp_cli.known", description=__doc__)
    parser.add_argument("what", choices=["make"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(MAKERS)} (default: all)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in MAKERS]
    if unknown:
        parser.error(f"unknown case '{unknown[0]}'; known: {', '.join(MAKERS)}")
    for name in arguments.names or MAKERS:
        case = MAKERS[name](name)
        edges = "unknown" if case.edges is None else len(case.edges)
        print(f"{name}: {len(case.nodes)} nodes and {edges} edges in the circuit", flush=True)


if __name__ == "__main__":
    main()
