"""The QK fix on every architecture, against one query or key at a time replaced in the plain Hugging Face model."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from oracles.plain import ROWS, build, plain
from oracles.wrapped import close, double_by_default, exact_float64, pairs

from relp_cli.errors import RelpError
from relp_cli.models.load import wrap
from relp_cli.models.model import Model
from relp_cli.nodes.attention import attention_scores, heads_are_coupled
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.scoring import score

QK = {"query": "q", "key": "k"}
BATCH = pairs(2, 5)


@cache
def wrapped(name: str) -> Model:
    with exact_float64():
        return wrap(build(ROWS[name]), None, name)


@pytest.mark.parametrize("name", ROWS)
def test_qk_fix_equals_replacing_one_query_or_key_in_plain_hugging_face(name: str) -> None:
    with exact_float64(), double_by_default():
        model, oracle = wrapped(name), plain(name)
        got = score(model, [BATCH], "atp_star", list(QK), grad_drop=False, keep_examples=True)
        with torch.enable_grad():
            embedded = oracle.hf.get_input_embeddings()
            handle = embedded.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
            patterns, logits = oracle.attention(BATCH.original)
            handle.remove()
            value = logits.gather(1, BATCH.answer) - logits.gather(1, BATCH.foil)
            slopes = torch.autograd.grad(value.sum(), patterns)
        for kind, which in QK.items():
            source = oracle.heads(BATCH.patch, which)
            for layer, pos in ((0, 2), (1, 4)):
                for head, other in enumerate(source[layer]):

                    def swap(own: torch.Tensor, other: torch.Tensor = other, pos: int = pos) -> torch.Tensor:
                        own = own.clone()
                        own[:, pos] = other[:, pos]
                        return own

                    moved, _ = oracle.attention(BATCH.original, (layer, which, head, swap))
                    want = ((moved[layer] - patterns[layer]) * slopes[layer]).sum((1, 2, 3)).detach()
                    close(got[kind].examples[:, layer, pos, head], want)
    assert got["key"].examples.shape[-1] == oracle.n_kv()


@pytest.mark.parametrize(("name", "coupled"), [("olmo2", True), ("olmo3", True), ("qwen3", False), ("opt", False)])
def test_a_norm_over_all_heads_couples_them(name: str, coupled: bool) -> None:
    with exact_float64(), double_by_default():
        model = wrapped(name)
        assert [heads_are_coupled(model, NODE_KINDS[kind]) for kind in QK] == [coupled, coupled]
        cost = score(model, [BATCH], "atp_star", list(QK), grad_drop=False).meta["forwards_per_pair"]
    assert cost == (2 + 4 + 2 if coupled else 4)


def test_scores_that_do_not_give_the_pattern_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    monkeypatch.setattr("relp_cli.nodes.attention.PATTERN", NODE_KINDS["head"])
    with exact_float64(), torch.no_grad(), pytest.raises(RelpError, match=r"llama .*cannot be read .*qk_fix=false"), (
        attention_scores(model)
    ):  # fmt: skip
        model.logits(BATCH.original)
