"""Nodes on every architecture: exact patching, AtP and the forward pass against the plain Hugging Face model, in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from oracles.make import MOE, exact_float64
from oracles.plain import N_HEADS, N_LAYERS, ROWS, Plain, build, part, plain
from oracles.wrapped import close, double_by_default, pairs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from relp_cli.errors import RelpError
from relp_cli.models.load import wrap
from relp_cli.models.model import Model
from relp_cli.scoring import score

BATCH = pairs(2, 5)
KINDS = ("resid_pre", "attn_out", "mlp_out", "head", "query", "key", "value", "mlp_neuron")
VECTORS = ("resid_pre", "attn_out", "mlp_out")
NO_LN = ("stablelm-qk",)  # per-head norms at which TransformerLens shows no scale


@cache
def wrapped(name: str) -> Model:
    with exact_float64():
        return wrap(build(ROWS[name]), None, name)


class Sites:
    """Where a node kind lives in the plain model: how to edit it, and what it is."""

    def __init__(self, oracle: Plain) -> None:
        self.oracle, self.row = oracle, oracle.row

    def module(self, kind: str, layer: int) -> tuple[nn.Module, str, float]:
        """(module, "in" or "out": which of its tensors, what the node is a multiple of)."""
        row, block = self.row, self.oracle.layers[layer]
        if kind == "resid_pre":
            return block, "in", 1.0
        if kind == "attn_out":
            return part(block, row.ln1_post or row.o), "out", row.multiplier
        if kind == "mlp_out":
            return part(block, row.ln2_post or row.mlp_out or row.mlp), "out", row.multiplier
        if kind == "head":
            return part(block, row.o), "in", 1.0
        return self.down(block), "in", 1.0

    def down(self, block: nn.Module) -> nn.Module:
        """The MLP's last linear layer."""
        if self.row.mlp_out:
            return part(block, self.row.mlp_out)
        linears = [m for m in part(block, self.row.mlp).modules() if type(m).__name__ in ("Linear", "Conv1D")]
        names = ("down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h")
        named = [m for n, m in part(block, self.row.mlp).named_modules() if n.rpartition(".")[2] in names]
        return (named or linears)[-1]

    @contextmanager
    def edited(self, kind: str, layer: int, fn: Callable[[Tensor], Tensor]) -> Any:
        """`fn` of the node's tensor Float[batch, pos, width] goes on instead of it."""
        if kind in ("query", "key", "value"):
            which = {"query": "q", "key": "k", "value": "v"}[kind]
            module = self.oracle.projection(layer, which, 0)[0]
            rows = torch.cat([torch.arange(r.start, r.stop) for r in self.oracle._rows(layer, which)])

            def project(_m: Any, _a: Any, out: Tensor) -> Tensor:
                out = out.clone()
                out[..., rows] = fn(out[..., rows])
                return out

            handle = module.register_forward_hook(project)
        else:
            module, side, factor = self.module(kind, layer)

            def change(x: Tensor) -> Tensor:
                shaped = x.view(len(BATCH), BATCH.n_pos, -1) if x.ndim == 2 else x
                return (fn(shaped * factor) / factor).view(x.shape)

            def before(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    return (change(args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

            def after(_m: Any, _a: Any, out: Any) -> Any:
                return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

            handle = (
                module.register_forward_pre_hook(before, with_kwargs=True)
                if side == "in"
                else module.register_forward_hook(after)
            )
        try:
            yield
        finally:
            handle.remove()

    def values(self, kind: str, layer: int, ids: Tensor) -> Tensor:
        seen: list[Tensor] = []
        with self.edited(kind, layer, lambda x: seen.append(x) or x):  # type: ignore[func-returns-value]
            self.oracle.hf(input_ids=ids, use_cache=False)
        return seen[-1]

    def value(self, ids: Tensor) -> Tensor:
        logits = self.oracle.hf(input_ids=ids, use_cache=False).logits[:, -1]
        return (logits.gather(1, BATCH.answer) - logits.gather(1, BATCH.foil))[:, 0]


def kinds_of(name: str) -> list[str]:
    return [k for k in KINDS if not (name in MOE and k == "mlp_neuron")]


@pytest.mark.parametrize("name", ROWS)
def test_scores_equal_those_of_plain_hugging_face(name: str) -> None:
    with exact_float64(), double_by_default():
        model, sites = wrapped(name), Sites(plain(name))
        kinds = kinds_of(name)
        assert BATCH.patch is not None
        close(model.logits(BATCH.original), sites.oracle.hf(input_ids=BATCH.original).logits[:, -1])
        atp = score(model, [BATCH], "atp", kinds, keep_examples=True)
        exact = score(model, [BATCH], "act_patch", [k for k in kinds if k != "mlp_neuron"], keep_examples=True)
        assert exact.meta["patched_share_computed"] < 0.4  # runs start at the patched block and position
        before = sites.value(BATCH.original)
        for kind in kinds:
            for layer in range(N_LAYERS):
                source = sites.values(kind, layer, BATCH.patch)
                with torch.enable_grad():
                    leaf = sites.values(kind, layer, BATCH.original).detach().requires_grad_(True)
                    with sites.edited(kind, layer, lambda _, leaf=leaf: leaf):
                        (grad,) = torch.autograd.grad(sites.value(BATCH.original).sum(), leaf)
                product = ((source - leaf) * grad).detach()
                got = atp[kind].examples[:, layer]
                want = product.sum(-1) if kind in VECTORS else product.unflatten(-1, (got.shape[-1], -1)).sum(-1)
                close(got, want)
                if kind == "mlp_neuron":
                    continue
                pos, unit = BATCH.n_pos - N_LAYERS + layer, (layer + 1) % N_HEADS
                theirs = exact[kind].examples[:, layer, pos]
                n = 1 if kind in VECTORS else theirs.shape[-1]
                unit = unit % n
                width = source.shape[-1] // n

                def put(
                    x: Tensor, pos: int = pos, at: slice = slice(unit * width, (unit + 1) * width), s: Tensor = source
                ) -> Tensor:
                    x = x.clone()
                    x[:, pos, at] = s[:, pos, at]
                    return x

                with sites.edited(kind, layer, put):
                    effect = sites.value(BATCH.original) - before
                close(theirs if kind in VECTORS else theirs[:, unit], effect)
                assert kind in ("query", "key") or effect.abs().max() > 1e-6, "a vacuous comparison"


def norms_of(oracle: Plain) -> int:
    """Leaf modules of the plain model whose class is a norm, those over embeddings included."""
    return sum("norm" in type(m).__name__.lower() and not list(m.children()) for m in oracle.hf.modules())


@pytest.mark.parametrize("name", [n for n in ROWS if n not in NO_LN])
def test_the_preset_reaches_every_norm_and_mlp_and_leaves_values_alone(name: str) -> None:
    with exact_float64(), double_by_default():
        model = wrapped(name)
        got = score(model, [BATCH], "relp", ["resid_pre"])
        assert got.meta["rules"]["ln"] == norms_of(plain(name))
        assert got.meta["rules"]["identity"] == N_LAYERS
        assert ("half" in got.meta["rules"]) == model.shape.gated
        plainly = score(model, [BATCH], "relp", ["resid_pre"], rules=[])
        close(plainly["resid_pre"].mean, score(model, [BATCH], "atp", ["resid_pre"])["resid_pre"].mean)
        assert (got["resid_pre"].mean - plainly["resid_pre"].mean).abs().max() > 1e-6
        assert got.meta["mean_metric"] == pytest.approx(plainly.meta["mean_metric"], abs=1e-12)


def test_norms_without_a_scale_are_not_passed_over() -> None:
    with exact_float64(), double_by_default(), pytest.raises(RelpError, match=r"does not reach 12 norms.*q_layernorm"):
        score(wrapped("stablelm-qk"), [BATCH], "relp", ["resid_pre"])


REFUSED = {
    "gpt2": ({"scale_attn_weights": False}, "off by .*% of the largest"),
    "gpt_bigcode": ({"scale_attn_weights": False}, "off by .*% of the largest"),
    "starcoder2": ({"norm_epsilon": 0.05}, "off by .*% of the largest"),
    "gpt_neox": ({"attention_bias": False}, "cannot wrap"),
    "phi": ({"qk_layernorm": True}, "cannot wrap"),
    "opt": ({"do_layer_norm_before": False}, "cannot run"),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, "cannot wrap"),
    "bloom": ({"apply_residual_connection_post_layernorm": True}, "resid_post = resid_pre"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_computed_otherwise_is_refused_in_one_line(name: str) -> None:
    changes, message = REFUSED[name]
    with exact_float64(), pytest.raises(RelpError, match=message) as refusal:
        wrap(build(ROWS[name], **changes), None, name)
    assert "\n" not in str(refusal.value)


def test_the_activation_is_the_one_that_the_mlp_computes() -> None:
    assert wrapped("bloom").shape.activation in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # unnamed in its config
    assert wrapped("mpt").shape.activation == "gelu"
    with exact_float64(), pytest.raises(RelpError, match="MLP hidden = relu"):  # Gemma's code goes by hidden_act
        wrap(build(ROWS["gemma"], hidden_activation="relu"), None, "gemma")


def test_tokens_and_positions_that_a_model_does_not_have() -> None:
    model = wrapped("gpt2")
    with pytest.raises(RelpError, match="token id 50: model gpt2 has ids 0 to 49"):
        model.logits(torch.tensor([[1, 50]]))
    with pytest.raises(RelpError, match="a prompt of 65 tokens; model gpt2 has 64 positions"):
        model.logits(torch.ones(1, 65, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["olmo", "olmo2"])
def test_narrow_dtypes_where_the_wrapper_rotates_in_float32(name: str, dtype: torch.dtype) -> None:
    config = CONFIG_MAPPING[ROWS[name].model_type](**ROWS[name].config)
    narrow = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    wide.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})  # before a bridge renames them
    got, want = (score(wrap(m, None, name), [BATCH], "atp", ["attn_out"])["attn_out"].mean for m in (narrow, wide))
    assert (got - want).abs().max() < 0.1 * want.abs().max()


def test_the_text_part_of_a_multimodal_model() -> None:
    pictures = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**ROWS["gemma3"].config, "model_type": "gemma3_text"}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=pictures, mm_tokens_per_image=4)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    logits = hf(input_ids=BATCH.original).logits[:, -1].detach()
    model = wrap(hf, None, "multimodal")
    close(model.logits(BATCH.original), logits, 1e-5)
    assert (model.shape.vocab, model.shape.d_mlp) == (50, 48)
    assert score(model, [BATCH], "relp", ["mlp_neuron"]).meta["rules"] == {"ln": 13, "identity": 2, "half": 2}
