"""Mixtures of experts: every node kind and method against the plain-torch oracle, and what LRP conserves of them."""

import pytest
import torch
from oracles import scores as S
from oracles.forward import forward
from oracles.make import MOE, exact_float64, random_model
from oracles.wrapped import case, close, double_by_default, pairs, run

from relp_cli.errors import RelpError
from relp_cli.lrp.context import lrp, recording
from relp_cli.models.load import load_model, wrap
from relp_cli.scoring import score

KINDS = [k for k in S.KINDS if k != "mlp_neuron"]
PRESET = ("ln", "identity", "half")
MODES = [{"direction": "denoising"}, {"baseline": "zero"}]


def equal(got, want, kinds=KINDS):
    for kind in kinds:
        close(got[kind].examples, want[kind])
        assert want[kind].abs().max() > 1e-3, "a vacuous comparison"


@pytest.mark.parametrize("shape", MOE)
def test_the_oracle_and_the_wrapped_model_are_hugging_faces(shape):
    hf, c = random_model(shape, 0), case(shape)
    with exact_float64():
        want = hf(c.batch.original).logits
        close(c.model.logits(c.batch.original, all_positions=True), want)
        close(forward(c.weights, c.config, c.batch.original).logits, want)


@pytest.mark.parametrize("shape", MOE)
def test_scores_equal_the_oracle(shape):
    c = case(shape)
    equal(run(c, "atp", KINDS), S.atp(*c.prompts, c.metric, kinds=KINDS))
    for mode in MODES:
        # against zero, a query or key that is normed afterwards has no gradient along itself
        kinds = [k for k in KINDS if k not in ("query", "key") or "baseline" not in mode]
        got = run(c, "relp", kinds, **mode)
        equal(got, S.relp(*c.prompts, c.metric, set(PRESET), kinds, **mode), kinds)
        norms = 13 if shape in ("qwen3_moe", "olmoe") else 7
        assert got.meta["rules"] == {"ln": norms, "identity": 3, "half": 3}
    for rule in ("identity", "half"):
        kinds = ["resid_pre", "mlp_out"]
        equal(run(c, "relp", kinds, rules=[rule]), S.relp(*c.prompts, c.metric, {rule}, kinds), kinds)


@pytest.mark.parametrize("shape", MOE)
def test_exact_patching_equals_the_oracle_also_where_other_experts_are_chosen(shape):
    c = case(shape)
    kinds = ["mlp_out", "value"]
    equal(run(c, "act_patch", kinds), S.act_patch(*c.prompts, c.metric, kinds), kinds)
    assert len(set(choices(c.model, c.batch.original)).symmetric_difference(choices(c.model, c.batch.patch))) > 0


def choices(model, tokens):
    """(layer, token, expert) of one run."""
    seen = []
    point = "blocks.{}.mlp.gate.hook_expert_indices"
    with torch.no_grad(), exact_float64(), model.hooks([(point.format(n), seen.append) for n in range(3)]):
        model.logits(tokens)
    return [(n, t, e) for n, layer in enumerate(seen) for t, row in enumerate(layer.tolist()) for e in row]


@pytest.mark.parametrize("shape", MOE)
def test_the_forward_pass_stays_the_models_own_bit_for_bit(shape):
    c = case(shape)
    with exact_float64():
        plain = c.model.logits(c.batch.original)
        for rules in (PRESET, ("act2", "gate2"), ("act2", "half")):
            with torch.no_grad(), recording(c.model, rules) as other:
                c.model.logits(c.batch.patch)
            with torch.enable_grad(), lrp(c.model, rules, other):
                assert torch.equal(c.model.logits(c.batch.original).detach(), plain)


def paths(c, layer, x, chosen, direction):
    """From the Hugging Face weights, per token and chosen expert (and the shared one): weight w [tokens k], output E
    [tokens k d], and the derivative of w along `direction` [tokens k].
    """
    w, at = c.weights, f"model.layers.{layer}.mlp."
    normalised = c.config.model_type == "mixtral" or c.config.norm_topk_prob
    shared = c.config.model_type == "qwen2_moe"

    def weights(x):
        scores = x @ w[at + "gate.weight"].T
        kept = scores.gather(1, chosen)
        routed = (kept - (kept if normalised else scores).logsumexp(1, keepdim=True)).exp()
        return torch.cat([routed, (x @ w[at + "shared_expert_gate.weight"].T).sigmoid()], 1) if shared else routed

    outputs = []
    for token, row in zip(x, chosen, strict=True):
        gate, up = (w[at + "experts.gate_up_proj"][row] @ token).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
        outputs.append((w[at + "experts.down_proj"][row] @ hidden[..., None])[..., 0])
    out = torch.stack(outputs)
    if shared:
        gate, up, down = (w[f"{at}shared_expert.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        out = torch.cat([out, ((torch.nn.functional.silu(x @ gate) * (x @ up)) @ down)[:, None]], 1)
    return *torch.func.jvp(weights, (x,), (direction,)), out


POINTS = ("hook_in", "mlp.hook_in", "mlp.gate.hook_expert_indices", "hook_mlp_out")


@pytest.mark.parametrize("shape", MOE)
def test_what_is_not_conserved_is_the_routing_softmaxs_share(shape):
    """Half gives half of w·E to E, which passes it on to x, and half to w. The routing softmax is not homogeneous: of w's
    half only (x·∇w)/w is x's. So a layer lacks Σ ½·(w − x·∇w)·E·ρ over all paths at and above it, and nothing else.
    """
    c, seen, lost = case(shape, bias=False), {}, 0.0
    with exact_float64(), torch.enable_grad():
        start = {"blocks.0.hook_in": lambda h: h.detach().requires_grad_()}
        keep = [(f"blocks.{n}.{p}", lambda v, at=(n, p): seen.__setitem__(at, v)) for n in range(3) for p in POINTS]
        with c.model.hooks(start), lrp(c.model, [*PRESET, "ah"]), c.model.hooks(keep):
            value = c.metric(c.model.logits(c.batch.original)[:, None])
        nodes = [seen[n, p] for n in range(3) for p in ("hook_in", "hook_mlp_out")]
        rho = torch.autograd.grad(value.sum(), nodes)
    for layer in (2, 1, 0):
        x = seen[layer, "mlp.hook_in"].detach().flatten(0, 1)
        weight, slope, output = paths(c, layer, x, seen[layer, "mlp.gate.hook_expert_indices"], x)
        of_output = torch.einsum("td,tkd->tk", rho[2 * layer + 1].flatten(0, 1), output)
        lost = lost + (0.5 * (weight - slope) * of_output).sum(1).unflatten(0, (4, 6)).sum(1)
        close((seen[layer, "hook_in"] * rho[2 * layer]).sum((1, 2)).detach(), value.detach() - lost)
        assert lost.abs().min() > 1e-3


@pytest.mark.parametrize("shape", MOE)
def test_two_point_rules_give_the_exact_change_but_for_the_routing_softmax(shape):
    """act2 and gate2, the run's experts in both runs: Σ w̄·(E' − E) + Ē·(∇w·(x' − x)), bars the two runs' averages."""
    c, point = case(shape), "blocks.1.mlp."
    seen = {}
    with exact_float64():
        with torch.no_grad(), recording(c.model, ["act2", "gate2"]) as other:
            c.model.logits(c.batch.patch)
        leaf = {point + "hook_in": lambda v: seen.setdefault("x", v.detach().requires_grad_())}
        keep = {point + "hook_out": lambda v: seen.__setitem__("y", v)}
        keep[point + "gate.hook_expert_indices"] = lambda v: seen.__setitem__("chosen", v)
        with torch.enable_grad(), c.model.hooks(leaf), lrp(c.model, ["act2", "gate2"], other), c.model.hooks(keep):
            c.model.logits(c.batch.original)
            g = torch.randn(seen["y"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            (rho,) = torch.autograd.grad(seen["y"], seen["x"], g)
    x, there = (t.detach().flatten(0, 1) for t in (seen["x"], other["blocks.1.mlp"]["x"]))
    weight, slope, output = paths(c, 1, x, seen["chosen"], there - x)
    weight_there, _, output_there = paths(c, 1, there, seen["chosen"], x)
    change = ((weight + weight_there) / 2)[..., None] * (output_there - output)
    change = change + slope[..., None] * (output + output_there) / 2
    close(((there - x) * rho.flatten(0, 1)).sum(1), torch.einsum("td,tkd->t", g.flatten(0, 1), change))


def test_single_precision_and_a_folder_of_separate_experts(tmp_path):
    """save_pretrained writes one tensor per expert; float32 with the default experts' implementation chosen anew."""
    c = case("mixtral")
    with exact_float64():
        hf = random_model("mixtral", 0)
    hf.to(torch.float32).save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m")
    got = score(model, [pairs()], "relp", KINDS)
    want = S.relp(*c.prompts, c.metric, set(PRESET), KINDS)
    for kind in KINDS:
        close(got[kind].mean.float(), want[kind].mean(0).float(), 1e-4)


def test_atp_star_serves_mixtures():
    c = case("mixtral")
    got = run(c, "atp_star", ["query", "head"], grad_drop=False)
    exact = S.atp(*c.prompts, c.metric, kinds=["head"])
    close(got["head"].examples, exact["head"])


@pytest.mark.parametrize("shape", MOE)
def test_experts_are_no_nodes_and_say_so(shape):
    for method in ("relp", "act_patch"):
        with pytest.raises(RelpError, match=f"{shape}.* has no mlp_neuron nodes: its MLPs are mixtures of experts"):
            run(case(shape), method, ["mlp_neuron"])


def test_rules_on_linear_layers_are_refused():
    with pytest.raises(RelpError, match=r"'epsilon=0\.01' does not reach the experts' linear layers"):
        run(case("mixtral"), "relp+epsilon", ["resid_pre"])


@pytest.mark.parametrize("fault", ["activation", "weights"])
def test_a_mixture_of_another_form_is_refused(fault):
    with exact_float64():
        hf = random_model("olmoe", 0)
        if fault == "activation":
            hf.config.hidden_act = "gelu"
        else:
            hf.model.layers[1].mlp.gate.forward = scaled(hf.model.layers[1].mlp.gate.forward)
        with pytest.raises(RelpError, match=r"layer \d does not satisfy MLP = Σ weight·W_down"):
            wrap(hf, None, "other")


def scaled(forward):
    """A router whose weights are twice the softmax's."""

    def twice(x):
        logits, weights, chosen = forward(x)
        return logits, 2 * weights, chosen

    return twice


@pytest.mark.parametrize("shape", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_writers_edges_sum_to_its_own_score(shape):
    """Σ over the readers of u = δu · the gradient at the stream after u: the oracle's node score, summed over positions."""
    c = case(shape)
    for method, rules in (("eap", set()), ("relp_edges", set(PRESET))):
        with exact_float64(), double_by_default():
            edges = score(c.model, [c.batch], method, ["edges"])["edges"]
        want = S.relp(*c.prompts, c.metric, rules, ["resid_pre", "mlp_out"])
        total = dict(zip(edges.writers, edges.mean.sum(-1), strict=True))
        close(total["input"].double(), want["resid_pre"].mean(0)[0].sum())
        close(torch.stack([total[f"m{n}"] for n in range(3)]).double(), want["mlp_out"].mean(0).sum(-1))
