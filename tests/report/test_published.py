"""The paper's numbers, and ours beside them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from relp_cli.errors import RelpError
from relp_cli.report.published import beside, published, published_figure3, published_table5
from tests.report.made import agreement_rows, evaluation

# Paper, appendix B, Table 5: residual AtP, RelP; attention AtP, RelP; MLP AtP, RelP.
TABLE_5 = {
    "GPT-2 small": (0.753, 0.968, 0.979, 0.962, 0.195, 0.992),
    "GPT-2 medium": (0.671, 0.884, 0.961, 0.982, 0.551, 0.993),
    "GPT-2 large": (0.740, 0.853, 0.461, 0.965, 0.006, 0.956),
    "Pythia-70M": (0.728, 0.898, 0.981, 0.986, 0.507, 0.967),
    "Pythia-410M": (0.695, 0.874, 0.879, 0.903, 0.501, 0.948),
    "Qwen2-0.5B": (0.684, 0.922, 0.933, 0.965, 0.717, 0.981),
    "Qwen2-7B": (0.230, 0.549, 0.395, 0.569, 0.471, 0.622),
    "Gemma2-2B": (0.391, 0.769, 0.942, 0.956, 0.910, 0.952),
}


def test_table_5_is_the_papers():
    table = published_table5()
    assert len(table) == 48
    wide = table.pivot(index="model", columns=["kind", "method"], values="pcc")
    order = [(k, m) for k in ("resid_pre", "attn_out", "mlp_out") for m in ("atp", "relp")]
    for model, row in TABLE_5.items():
        assert tuple(wide.loc[model, order]) == row


def test_every_published_file_names_its_source():
    assert "Table 5" in published("relp_table5")["source"]
    assert "Figure 3" in published("figure3")["source"]
    with pytest.raises(RelpError, match="did you mean 'figure3'"):
        published("figure4")


def test_ours_beside_table_5():
    table = beside(agreement_rows()).set_index(["model", "nodes"])
    gpt2 = table.loc[("GPT-2 small", "MLP")]  # loaded as "gpt2"
    assert (gpt2["relp paper"], gpt2["relp ours"]) == (0.992, pytest.approx(0.72))
    assert gpt2["relp ours − paper"] == pytest.approx(0.72 - 0.992)
    assert np.isnan(table.loc[("Qwen2-7B", "residual"), "atp ours"])
    assert np.isnan(table.loc[("tiny", "residual"), "atp paper"])
    assert table.loc[("tiny", "residual"), "atp ours"] == pytest.approx(0.6)


def test_models_are_known_by_hub_name_and_folder():
    rows = agreement_rows()
    for name in ("openai-community/gpt2", "/data/models/GPT2", "gpt2"):
        table = beside(rows.replace({"model": {"gpt2": name}})).set_index(["model", "nodes"])
        assert table.loc[("GPT-2 small", "residual"), "atp ours"] == pytest.approx(0.5)


def test_other_tasks_are_left_out_and_other_settings_are_named():
    rows = agreement_rows().assign(direction="denoising", n_pairs=40)
    table = beside(pd.concat([rows, rows.assign(task="sva_simple", pcc=0.0)]))
    assert table.set_index(["model", "nodes"]).loc[("GPT-2 small", "MLP"), "relp ours"] == pytest.approx(0.72)
    assert "ours: direction denoising (paper: noising)" in table.attrs["notes"]
    assert "ours: n_pairs 40 (paper: 100)" in table.attrs["notes"]
    only_other = beside(rows.assign(task="sva_simple"))
    assert only_other.filter(like="ours").isna().all(axis=None)


def test_ours_beside_figure_3():
    assert set(published_figure3().kind) == {"feature", "mlp_neuron"}
    tasks = [evaluation(t, points={15: 0.0, 1500: v, 15000: 1.0}) for t, v in (("a", 0.2), ("b", 0.4))]
    table = beside(pd.concat(tasks))
    neurons = table[table.nodes == "MLP neurons"].set_index("n_nodes")
    assert neurons.loc[1500, "ours"] == pytest.approx(0.3)
    assert neurons.loc[1500, "Pythia-70M, paper"] == 0.5
    assert neurons.loc[1500, "our nodes for as much"] == np.ceil(1500 * 10 ** (0.2 / 0.7))
    assert neurons.loc[2300, "ours"] == pytest.approx(0.3 + 0.7 * np.log10(2300 / 1500))
    assert table[table.nodes == "features"]["ours"].isna().all()
    assert any("not the paper's model: tiny" in note for note in table.attrs["notes"])


def test_beside_needs_one_of_the_two_forms():
    with pytest.raises(RelpError, match=r"'pcc' .* or 'faithfulness'"):
        beside(pd.DataFrame({"model": ["x"]}))
