"""Write the golden numbers: `python -m golden.make` in `tests/`. Only where numbers are meant to change; the commit says why."""

from __future__ import annotations

import json
from pathlib import Path

from golden.cells import cells, fingerprint

FILE = Path(__file__).parent / "golden.json"


def main() -> None:
    content = {name: {key: fingerprint(t) for key, t in cell().items()} for name, cell in cells().items()}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
