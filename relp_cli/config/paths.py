"""Where shipped YAML files and word lists live: package data in a wheel, the repository's folders in a checkout."""

from __future__ import annotations

from pathlib import Path

from relp_cli.errors import RelpError, unknown

_PACKAGE = Path(__file__).resolve().parent.parent


def data_root(kind: str) -> Path:
    """The folder of shipped `kind` ("configs" or "datasets"): `relp_cli/_data/<kind>` when installed from a wheel,
    else the repository's top-level folder of that name.

    Raises: RelpError where neither exists (a broken installation).
    """
    for root in (_PACKAGE / "_data" / kind, _PACKAGE.parent / kind):
        if root.is_dir():
            return root
    raise RelpError(f"this installation has no {kind} folder (looked in {_PACKAGE / '_data'} and {_PACKAGE.parent})")


def list_configs(kind: str) -> list[str]:
    """Names of the shipped configs of a kind ("tasks", "jobs"), sorted."""
    return sorted(path.stem for path in (data_root("configs") / kind).glob("*.yaml"))


def looks_like_path(name: str) -> bool:
    """Whether `name` can only be meant as a file: it has a separator or a file ending."""
    return "/" in name or "\\" in name or Path(name).suffix != ""


def find_config(kind: str, name_or_path: str | Path) -> Path:
    """The YAML file of a shipped name ("ioi") or of a path ("my/task.yaml").

    Raises: RelpError for a path that is not a file and for an unknown name (with the nearest shipped one).
    """
    name = str(name_or_path)
    if looks_like_path(name):
        if not Path(name).is_file():
            raise RelpError(f"{name}: no such file")
        return Path(name)
    shipped = data_root("configs") / kind / f"{name}.yaml"
    if not shipped.is_file():
        raise unknown(kind.removesuffix("s"), name, list_configs(kind))
    return shipped
