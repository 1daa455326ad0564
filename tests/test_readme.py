"""The README's Python and YAML run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import relp_cli

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = blocks("python")
    names: dict[str, object] = {}
    exec(first, names)
    assert 0 < names["table"].faithfulness.iloc[0] < 2  # type: ignore[attr-defined]
    names["circuit"].save("runs/ioi/circuit.json")  # type: ignore[attr-defined]
    exec(second, names)
    batch = names["pairs"][0]  # type: ignore[index]
    assert names["logits"].shape == (len(batch), names["model"].shape.vocab)  # type: ignore[attr-defined]


def test_task_yaml_is_a_task_that_the_embedded_model_does(tmp_path, relp):
    (tmp_path / "my_task.yaml").write_text(blocks("yaml")[0])
    assert relp("validate", "my_task.yaml").code == 0
    model = relp_cli.load_model("tiny-gpt2")
    (batch,) = relp_cli.load_task(tmp_path / "my_task.yaml").pairs(model, 20)
    assert [r for r, same in zip(batch.roles, (batch.original == batch.patch).all(0), strict=True) if not same] == [
        "end"
    ]


def test_the_documents_that_anything_cites_exist():
    root = Path(__file__).parent.parent
    texts = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("relp_cli/**/*.py"), *root.glob("tests/**/*.py")]
    cited = {name for path in texts for name in re.findall(r"\bdocs/\w+\.md|\b[A-Z]+\.md", path.read_text())}
    assert "docs/methods.md" in cited
    assert all((root / name).is_file() for name in cited), cited


def test_every_command_named_exists(relp):
    for verb in sorted(set(re.findall(r"`relp ([a-z-]+)", README))):
        assert relp(verb, "--help").code == 0, verb


def test_commands_of_make_run_are_the_ones_shown():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    shown = [
        line[2:].split("  #")[0].strip()
        for line in README.splitlines()
        if line.startswith("$ relp ") and "bench" not in line
    ]
    for command in shown:
        assert f"$(BIN)/{command}" in makefile, command
