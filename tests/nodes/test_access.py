"""Capture, split and patch: every node kind is the oracle's tensor, and a patched value reaches what follows."""

from contextlib import ExitStack

import pytest
import torch
from oracles import scores as S
from oracles.forward import forward
from oracles.make import SHAPES, exact_float64
from oracles.wrapped import case, close, hook_count, run

from relp_cli.errors import RelpError
from relp_cli.nodes.access import activations, capture, per_node, split, units
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind

UNITS = {"head": 4, "query": 4, "mlp_neuron": 48, "attn_dim": 32, "mlp_dim": 32, "resid_dim": 32}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_is_the_oracles_tensor(shape):
    c = case(shape)
    trace = forward(c.weights, c.config, c.batch.original)
    with exact_float64():
        seen = activations(c.model, c.batch.original, [NODE_KINDS[k] for k in NODE_KINDS])
    for name, layers in seen.items():
        kind = NODE_KINDS[name]
        assert len(layers) == 3
        assert units(c.model, kind) == UNITS.get(name, c.model.shape.n_kv_heads if name in ("key", "value") else 1)
        for layer, value in enumerate(layers):
            pieces = split(c.model, kind, value)
            assert pieces.shape[:3] == (4, 6, units(c.model, kind))
            assert torch.equal(pieces.reshape(value.shape), value)
            per = per_node(c.model, kind, value)
            assert per.ndim == len(kind.axes)
            if name in S.KINDS:
                want = trace[name][layer].detach()
                close(pieces if want.ndim == 4 else value, want)
                close(per, want if name == "mlp_neuron" else want.sum(-1))
    close(seen["resid_dim"][0], trace["resid_pre"][1].detach())
    assert torch.equal(seen["attn_dim"][1], seen["attn_out"][1])


def constant(value):
    return lambda _: value


@pytest.mark.parametrize("shape", SHAPES)
def test_replacing_a_value_equals_the_oracles_patch(shape):
    c = case(shape)
    other = forward(c.weights, c.config, c.batch.patch)
    for name in S.KINDS:
        with exact_float64(), torch.no_grad():
            fill = activations(c.model, c.batch.patch, [NODE_KINDS[name]])[name][1]
            with c.model.hooks({NODE_KINDS[name].point(1): constant(fill)}):
                got = c.model.logits(c.batch.original, all_positions=True)
            want = forward(c.weights, c.config, c.batch.original, patch={(name, 1): constant(other[name][1])})
        close(got, want.logits)


def test_logits_at_the_last_position_are_those_of_the_whole_run():
    for shape in SHAPES:
        c = case(shape)
        with exact_float64():
            whole = c.model.logits(c.batch.original, all_positions=True)
            close(c.model.logits(c.batch.original), whole[:, -1], 1e-13)
        close(whole, forward(c.weights, c.config, c.batch.original).logits.detach())


def test_capture_has_a_graph_only_where_gradients_are_on():
    c = case("gpt2")
    kind = NODE_KINDS["mlp_out"]
    with exact_float64():
        with capture(c.model, [kind]) as seen:
            c.model.logits(c.batch.original)
        assert all(v.requires_grad for v in seen["mlp_out"])
        assert not any(v.requires_grad for v in activations(c.model, c.batch.original, [kind])["mlp_out"])
        leaf = torch.randn(4, 6, 32, dtype=torch.float64)
        with capture(
            c.model, [NODE_KINDS["resid_pre"]], {"blocks.0.hook_in": lambda _: leaf.requires_grad_(True)}
        ) as seen:
            c.model.logits(c.batch.original)
    assert torch.equal(seen["resid_pre"][0], leaf)
    assert leaf.requires_grad
    assert not any(p.requires_grad for p in c.model.hf.parameters())


def test_hooks_run_in_order_and_are_removed_on_error():
    c = case("gpt2")
    before, order = hook_count(c.model), []
    first, second = (lambda _, n=n: order.append(n) for n in (1, 2))
    point = "blocks.1.hook_in"
    with exact_float64(), c.model.hooks([(point, first), (point, second)]):
        assert hook_count(c.model) == before + 2
        c.model.logits(c.batch.original)
    assert order == [1, 2]
    with pytest.raises(RelpError, match=r"gpt2 .* has no hook point 'blocks\.9\.hook_in'"):
        ExitStack().enter_context(c.model.hooks([(point, first), ("blocks.9.hook_in", second)]))
    assert hook_count(c.model) == before


def test_kinds_name_their_axes_and_points():
    assert {k: NODE_KINDS[k].axes for k in ("mlp_out", "head", "key", "mlp_neuron")} == {
        "mlp_out": ("layer", "pos"),
        "head": ("layer", "pos", "head"),
        "key": ("layer", "pos", "head"),
        "mlp_neuron": ("layer", "pos", "unit"),
    }
    assert NODE_KINDS["head"].point(3) == "blocks.3.attn.o.hook_in"
    with pytest.raises(RelpError, match="unknown node kind 'heads'; did you mean 'head'"):
        NODE_KINDS["heads"]
    with pytest.raises(RelpError, match="registered twice"):
        NODE_KINDS.add("head", NODE_KINDS["head"])


def test_a_new_kind_is_one_row():
    """`z` of a layer as one node: nothing but a row is needed to score it."""
    row = NodeKind("heads_together", "blocks.{l}.attn.o.hook_in", "vector", "all heads as one")
    NODE_KINDS.add(row.name, row)
    try:
        c = case("gpt2")
        got = run(c, "relp", ["heads_together", "attn_out", "head"])
        close(got["heads_together"].examples, got["attn_out"].examples)
        close(got["heads_together"].examples, got["head"].examples.sum(-1))
    finally:
        del NODE_KINDS._rows["heads_together"]
