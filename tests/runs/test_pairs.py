"""pairs.json is what was scored: tokens, answers and the metric, pair by pair; and a report needs no model beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import relp_cli
from relp_cli.runs.pairs import MOST, pair_records
from relp_cli.runs.rundir import checksum
from relp_cli.runs.scoring import Session, prepare
from relp_cli.runs.spec import ScoreSpec

EMBEDDED = Path(relp_cli.__file__).parent / "models/embedded"


def test_records_are_the_pairs_and_what_the_model_does_on_them() -> None:
    prepared = prepare(ScoreSpec(task="ioi", pairs=MOST + 30), Session("cpu"))
    records = pair_records(prepared.model.tokenizer, prepared.pairs, prepared.behaviour, prepared.metric)
    assert (records["of"], len(records["pairs"])) == (MOST + 30, MOST)
    decode = prepared.model.tokenizer.decode
    batch, logits = prepared.pairs[0], prepared.model.logits(prepared.pairs[0].original).double()
    for i in (0, len(batch) - 1):
        pair = records["pairs"][i]
        assert pair["original"] == [decode([t]) for t in batch.original[i].tolist()]
        assert pair["patch"] == [decode([t]) for t in batch.patch[i].tolist()]  # type: ignore[index]
        assert pair["answer"] == {"words": [decode([int(batch.answer[i, 0])])], "of": 1}
        difference = logits[i, batch.answer[i, 0]] - logits[i, batch.foil[i, 0]]
        assert pair["metric_original"] == pytest.approx(float(difference), rel=1e-5)
        assert pair["correct"] == bool(difference > 0)
    tokens: dict[str, set[str]] = {}
    for one in prepared.pairs:
        for row in one.original.tolist():
            for label, token in zip(one.labels, row, strict=True):
                tokens.setdefault(label, set()).add(decode([token]))
    assert records["shared"] == {label: next(iter(t)) if len(t) == 1 else "" for label, t in tokens.items()}
    assert records["shared"]["end"] != ""
    assert records["shared"]["IO"] == ""


def test_a_report_shows_a_runs_pairs_without_its_model_and_refuses_others(relp, tmp_path):
    shutil.copytree(EMBEDDED / "tiny-gpt2", tmp_path / "model")
    assert relp("score", "ioi", "--model", "model", "--nodes", "mlp_out", "--pairs", 4, "-o", "run").code == 0
    shutil.rmtree(tmp_path / "model")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["files"]["pairs.json"] == checksum(tmp_path / "run/pairs.json")
    done = relp("report", "run", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    page = (tmp_path / "run/report.html").read_text()
    assert made["bytes"] == len(page.encode())
    assert "pairs" in made["sections"]
    assert json.loads((tmp_path / "run/pairs.json").read_text())["pairs"][0]["original"][-1] == "to"
    assert '"original":["\\u003cbos\\u003e",' in page
    text = (tmp_path / "run/pairs.json").read_text()
    (tmp_path / "run/pairs.json").write_text(text.replace('"to"', '"at"'))
    refused = relp("report", "run")
    assert refused.code == 1
    assert "run/pairs.json is not the file that this run wrote; score again to replace it" in refused.err
