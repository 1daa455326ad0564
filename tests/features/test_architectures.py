"""Features on other architectures: at every site their scores and the error term's sum to the site's node score, and a whole
circuit is the model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.make import exact_float64
from oracles.plain import N_LAYERS, ROWS, build
from oracles.wrapped import close, double_by_default, pairs

import relp_cli as relp
from relp_cli.features.load import load_dictionaries
from relp_cli.models.load import wrap

from .folders import auto_encoder_state, write_learning

BATCH = pairs(3, 5)
NODE = {"attn": "attn_out", "mlp": "mlp_out", "resid": "resid_dim"}
NAMES = (
    "gptj",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "phi",
    "gemma3",
    "olmo2",
    "cohere",
    "granite",
    "stablelm-qk",
    "mixtral",
)


@pytest.mark.parametrize("name", NAMES)
def test_features_and_error_sum_to_the_sites_score(name: str, tmp_path: Path) -> None:
    with exact_float64(), double_by_default():
        model = wrap(build(ROWS[name]), None, name)
        for i, (kind, layer) in enumerate((k, n) for k in NODE for n in range(N_LAYERS)):
            write_learning(tmp_path / f"{kind}_out_layer{layer}", auto_encoder_state(32, 12, 10 * i, bias=0.2), None)
        found = load_dictionaries(tmp_path, model)
        for direction in ("noising", "denoising"):
            nodes = relp.score(model, [BATCH], "atp", list(NODE.values()), direction=direction)
            features = relp.score(model, [BATCH], "atp", ["feature"], direction=direction, dictionary=found)["feature"]
            for site in found:
                want = nodes[NODE[site.kind]].mean[site.layer]
                want = want if want.ndim == 1 else want.sum(-1)
                close(features.total(site), want)
                assert features.dense(site).abs().max() > 1e-6 or want.abs().max() == 0
        everything = relp.select(features, threshold=-1)
        row = relp.evaluate(model, [BATCH], everything, "mean", 0, dictionary=found).iloc[0]
        assert (row.faithfulness, row.completeness) == pytest.approx((1, 0), abs=1e-9)
        assert pytest.approx(row.F_empty, abs=1e-3) != row.F_M
        assert torch.isfinite(torch.tensor(row.F_empty))
