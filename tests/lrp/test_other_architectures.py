"""Architectures without a row in the families table: their rules come from what the bridge exposes, or they are refused."""

import pytest
import torch
from oracles.make import exact_float64
from oracles.wrapped import Case, close, pairs, run
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from relp_cli.errors import RelpError
from relp_cli.models.load import wrap
from relp_cli.tasks.metrics import METRICS

SIZE = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GQA = SIZE | {"num_key_value_heads": 2}
NORMS = {  # how many norms the LN-rule must find
    "mistral": (GQA, 7),
    "qwen3": (GQA | {"head_dim": 8}, 13),  # queries and keys are normed
    "gemma3_text": (GQA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 3}, 19),  # and post-norms
    "olmo2": (GQA, 13),  # post-norms only
    "phi": (SIZE, 4),  # parallel blocks that share one norm
    "cohere": (GQA, 4),
    "stablelm": (GQA, 7),  # LayerNorm with a gated MLP
    "granite": (GQA | {"residual_multiplier": 0.5, "logits_scaling": 2.0}, 7),  # contributions are scaled
}


def bias_free(name, config):
    rng = torch.Generator().manual_seed(0)
    with exact_float64():
        config = CONFIG_MAPPING[name](**config)
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
        hf.requires_grad_(False)
        for key, p in hf.named_parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.copy_(
                0 * noise if key.endswith("bias") else 1 + 0.2 * noise if p.ndim == 1 else noise / p.shape[-1] ** 0.5
            )
        return wrap(hf, None, name)


@pytest.mark.parametrize("name", NORMS)
def test_relevance_is_conserved(name):
    config, norms = NORMS[name]
    model = bias_free(name, config)
    c = Case(model, {}, None, pairs(), lambda _: None)
    rules = [*model.family.rules, "ah"]
    got = run(c, "relp", ["resid_pre"], rules=rules, baseline="zero")["resid_pre"]
    with exact_float64():
        value = METRICS["logit_diff"].fn(model.logits(c.batch.original), c.batch.answer, c.batch.foil)
    close(-got.examples.sum(2), value[:, None].expand(4, 3))
    assert got.meta["rules"] == {"ln": norms} | dict.fromkeys(rules[1:], 3)
    assert ("half" in rules) == model.shape.gated == (name != "phi")


def test_a_rule_that_reads_what_an_architecture_never_calls_is_refused():
    model = bias_free("opt", SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1})
    c = Case(model, {}, None, pairs(), lambda _: None)
    assert run(c, "relp", ["resid_pre"]).meta["rules"] == {"ln": 7, "identity": 3}
    for rule in ("ah", "attn2"):
        with pytest.raises(RelpError, match=rf"never calls blocks\.0\.attn\.hook_pattern, which rule {rule} reads"):
            run(c, f"relp+{rule}", ["resid_pre"])
