"""Every supported architecture as a tiny random *plain Hugging Face* model, run with edits at its own modules.

Nothing here knows TransformerLens or relp. A row says where a layer's modules are; `Plain.run` calls the model with module
hooks that give every reader (a head's query, key or value, an MLP, the logits) an input of its own and note what every
writer adds to the residual stream. Grouped queries: `ungrouped` is the same function with a key and value per query head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .edges import EdgeTrace, Edit
from .make import MOE, exact_float64

N_LAYERS, N_HEADS = 2, 4
IDS = {"bos_token_id": 0, "eos_token_id": 0}
SIZE: dict[str, Any] = IDS | {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
GPT2: dict[str, Any] = IDS | {"vocab_size": 50, "n_embd": 32, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": 64}
GQA = SIZE | {"num_key_value_heads": 2}


@dataclass(frozen=True)
class Row:
    """`config` of Hugging Face type `model_type`; the rest are module paths, of a layer's parts within a layer.

    qkv:  a path with `{}` for q, k, v, or one fused projection, whose rows are all q, all k, all v ("blocks") or each head's
          q, k and v in turn ("heads"); fused: which, without and (`fused_alone`) with a key and value per query head.
    ln2:  None: the MLP reads ln1's output where there is an ln1 ("shared"), else the stream itself.
    many: what the configuration says for a key and value per query head.
    """

    model_type: str
    config: Mapping[str, Any]
    layers: str = "model.layers"
    ln1: str | None = "input_layernorm"
    qkv: str = "self_attn.{}_proj"
    o: str = "self_attn.o_proj"
    ln1_post: str | None = None
    ln2: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_out: str | None = None
    ln2_post: str | None = None
    final: str = "model.norm"
    positions: str | None = None
    fused: str = ""
    fused_alone: str = ""
    many: Mapping[str, Any] = field(default_factory=lambda: {"num_key_value_heads": N_HEADS})
    multiplier: float = 1.0


OPT = {"layers": "model.decoder.layers", "ln1": "self_attn_layer_norm", "o": "self_attn.out_proj", "ln2": "final_layer_norm",
           "mlp": "fc1", "mlp_out": "fc2", "final": "model.decoder.final_layer_norm",
           "positions": "model.decoder.embed_positions", "many": {}}  # fmt: skip
H = {"layers": "transformer.h", "final": "transformer.ln_f", "many": {}}
LN12 = {"ln1": "ln_1", "ln2": "ln_2"}
FUSED = {"qkv": "self_attention.query_key_value", "o": "self_attention.dense"}
SANDWICH = {
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}
POST = SANDWICH | {"ln1": None, "ln2": None}
WINDOW = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 3}
FALCON: dict[str, Any] = SIZE | {"new_decoder_architecture": False}

ROWS: dict[str, Row] = {
    "gpt2": Row("gpt2", GPT2, **H, **LN12, qkv="attn.c_attn", fused="blocks", o="attn.c_proj", positions="transformer.wpe"),
    "gptj": Row("gptj", GPT2 | {"rotary_dim": 4}, **H | {"ln1": "ln_1", "ln2": None}, qkv="attn.{}_proj", o="attn.out_proj"),
    "gpt_neo": Row(
        "gpt_neo",
        IDS | {"vocab_size": 50, "hidden_size": 32, "num_layers": N_LAYERS, "num_heads": N_HEADS, "intermediate_size": 48,
               "attention_types": [[["global", "local"], 1]], "window_size": 3, "max_position_embeddings": 64},
        **H, **LN12, qkv="attn.attention.{}_proj", o="attn.attention.out_proj", positions="transformer.wpe",
    ),
    "gpt_neox": Row("gpt_neox", SIZE, layers="gpt_neox.layers", qkv="attention.query_key_value", fused="heads",
                    o="attention.dense", final="gpt_neox.final_layer_norm", many={}),
    "opt": Row("opt", SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}, **OPT),
    "bloom": Row("bloom", IDS | {"vocab_size": 50, "hidden_size": 32, "n_layer": N_LAYERS, "n_head": N_HEADS},
                 **H, **FUSED, fused="heads", mlp_out="mlp.dense_4h_to_h"),
    "falcon": Row("falcon", FALCON | {"multi_query": True, "parallel_attn": True}, **H | {"ln2": None}
                  | {"many": {"multi_query": False}}, **FUSED, fused="blocks", fused_alone="heads"),
    "falcon-rw": Row("falcon", FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
                     **H, **FUSED, fused="heads"),
    "mpt": Row("mpt", IDS | {"vocab_size": 50, "d_model": 32, "n_layers": N_LAYERS, "n_heads": N_HEADS, "max_seq_len": 64,
                             "expansion_ratio": 2},
               layers="transformer.blocks", ln1="norm_1", ln2="norm_2", qkv="attn.Wqkv", fused="blocks", o="attn.out_proj",
               mlp="ffn", mlp_out="ffn.down_proj", final="transformer.norm_f", many={}),
    "phi": Row("phi", SIZE, o="self_attn.dense", ln2=None, final="model.final_layernorm"),
    "phi3": Row("phi3", SIZE, qkv="self_attn.qkv_proj", fused="blocks"),
    "phi3-gqa": Row("phi3", GQA, qkv="self_attn.qkv_proj", fused="blocks"),
    "llama": Row("llama", GQA),
    "llama3": Row("llama", GQA | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8}}),
    "mistral": Row("mistral", GQA | {"sliding_window": 3}),
    "qwen2": Row("qwen2", GQA),
    "qwen3": Row("qwen3", GQA | {"head_dim": 8}),
    "gemma": Row("gemma", GQA | {"head_dim": 8}),
    "gemma2": Row("gemma2", GQA | WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, **SANDWICH),
    "gemma3": Row("gemma3_text", GQA | WINDOW, **SANDWICH),
    "olmo": Row("olmo", GQA),
    "olmo-clip": Row("olmo", GQA | {"clip_qkv": 0.7}),
    "olmo2": Row("olmo2", GQA, **POST),
    "olmo3": Row("olmo3", GQA | {"sliding_window": 3}, **POST),
    "stablelm": Row("stablelm", GQA),
    "stablelm-qk": Row("stablelm", GQA | {"qk_layernorm": True}),
    "stablelm-parallel": Row("stablelm", GQA | {"use_parallel_residual": True}, ln2=None),
    "starcoder2": Row("starcoder2", GQA),
    "gpt_bigcode": Row("gpt_bigcode", GPT2 | {"multi_query": True}, **LN12, **H | {"many": {"multi_query": False}},
                       qkv="attn.c_attn", fused="blocks", fused_alone="heads", o="attn.c_proj", positions="transformer.wpe"),
    "cohere": Row("cohere", GQA, ln2=None),
    "cohere-qk": Row("cohere", GQA | {"use_qk_norm": True}, ln2=None),
    "granite": Row("granite", GQA | {"residual_multiplier": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
                                     "logits_scaling": 2.0}, multiplier=0.5),
    "smollm3": Row("smollm3", GQA),
    "exaone4": Row("exaone4", GQA | {"sliding_window": 3}, **POST),
    "glm4": Row("glm4", GQA | {"head_dim": 8}, ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm"),
    **{name: Row(name, GQA | extra) for name, extra in MOE.items()},
}  # fmt: skip


def build(row: Row, seed: int = 0, **changes: Any) -> nn.Module:
    """A frozen float64 model whose every parameter is random; call it under `exact_float64`."""
    with exact_float64():
        config = CONFIG_MAPPING[row.model_type](**{**row.config, **changes})
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    hf.config._experts_implementation = "eager"  # the default, grouped_mm, has no float64
    hf.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, p in hf.named_parameters():
        noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        if p.ndim == 1 or "norm" in name:
            p.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)
        else:
            p.copy_(noise / p.shape[-1] ** 0.5)
    return hf


def part(root: nn.Module, path: str) -> Any:
    return reduce(getattr, path.split("."), root)


@dataclass(frozen=True, eq=False)
class Plain:
    """A plain model and where its parts are."""

    row: Row
    hf: Any
    fused: str

    @property
    def layers(self) -> list[nn.Module]:
        return list(part(self.hf, self.row.layers))

    def projection(self, layer: int, which: str, head: int) -> tuple[nn.Module, slice]:
        """The module that computes a head's "q", "k" or "v", and which of its outputs they are."""
        block, width = self.layers[layer], part(self.layers[layer], self.row.o)
        d = (width.weight.shape[0] if type(width).__name__ == "Conv1D" else width.weight.shape[1]) // N_HEADS
        if not self.fused:
            return part(block, self.row.qkv.format(which)), slice(head * d, (head + 1) * d)
        module = part(block, self.row.qkv)
        n_out = module.weight.shape[1 if type(module).__name__ == "Conv1D" else 0]
        n_kv = (n_out // d - N_HEADS) // 2
        place = {"q": 0, "k": 1, "v": 2}[which]
        start = 3 * head + place if self.fused == "heads" else (0, N_HEADS, N_HEADS + n_kv)[place] + head
        return module, slice(start * d, (start + 1) * d)

    def n_kv(self) -> int:
        return len(self._rows(0, "k"))

    def _rows(self, layer: int, which: str) -> list[slice]:
        module, first = self.projection(layer, which, 0)
        d, n = first.stop - first.start, N_HEADS
        if which != "q" and self.fused != "heads":
            out = module.weight.shape[1 if type(module).__name__ == "Conv1D" else 0] // d
            n = out if not self.fused else (out - N_HEADS) // 2
        return [self.projection(layer, which, h)[1] for h in range(n)]

    def run(self, ids: Tensor, edit: Edit = lambda _, x, __: x) -> EdgeTrace:
        """Every reader v reads edit(v, its stream, {what was written before u: Float[b pos d]})."""
        written: dict[str, Tensor] = {}
        with _edited(self, edit, written):
            logits = self.hf(input_ids=ids, use_cache=False).logits[:, -1]
        return EdgeTrace(written, logits)

    def attention(
        self, ids: Tensor, swap: tuple[int, str, int, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Patterns per layer, in autograd's graph, and logits; swap: (layer, which, head, function of that head's q or k)."""
        handles = []
        if swap is not None:
            layer, which, head, change = swap
            module, columns = self.projection(layer, which, head)

            def hook(_m: Any, _i: Any, out: Tensor) -> Tensor:
                out = out.clone()
                out[..., columns] = change(out[..., columns])
                return out

            handles.append(module.register_forward_hook(hook))
        try:
            out = self.hf(input_ids=ids, use_cache=False, output_attentions=True)
        finally:
            for handle in handles:
                handle.remove()
        return out.attentions, out.logits[:, -1]

    def heads(self, ids: Tensor, which: str) -> list[list[Tensor]]:
        """Per layer and head its query or key, Float[b pos d_head], as the projection gives it."""
        seen: dict[int, Tensor] = {}
        first = [self.projection(n, which, 0)[0] for n in range(N_LAYERS)]
        handles = [m.register_forward_hook(lambda _m, _i, o, n=n: seen.__setitem__(n, o)) for n, m in enumerate(first)]
        self.hf(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return [[seen[n][..., rows] for rows in self._rows(n, which)] for n in range(N_LAYERS)]


@contextmanager
def _edited(plain: Plain, edit: Edit, written: dict[str, Tensor]) -> Iterator[None]:
    row, hf = plain.row, plain.hf
    state: dict[Any, Tensor] = {}
    handles: list[Any] = []

    def before(module: nn.Module, fn: Callable[[Tensor], Tensor | None]) -> None:
        def hook(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                new = fn(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = fn(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(module: nn.Module, fn: Callable[[Tensor], Tensor | None]) -> None:
        handles.append(module.register_forward_hook(lambda _m, _a, out: fn(out)))

    def shaped(x: Tensor) -> Tensor:  # OPT flattens what enters its MLP
        return x.reshape(state["ids"].shape + x.shape[-1:])

    before(part(hf, row.layers)[0], lambda x: state.__setitem__("ids", x[..., 0]))
    if row.positions:
        after(part(hf, row.positions), lambda x: state.__setitem__("positions", x))

    def layer(n: int, block: Any) -> None:
        norm1 = part(block, row.ln1) if row.ln1 else lambda x: x

        def begin(x: Tensor) -> None:
            state[n] = x
            if n == 0:
                written["input"] = x - state.get("positions", torch.zeros(()))

        before(block, begin)
        readers: dict[nn.Module, list[tuple[str, slice]]] = {}
        for which in "qkv":
            for h in range(N_HEADS):
                module, columns = plain.projection(n, which, h)
                readers.setdefault(module, []).append((f"a{n}.h{h}<{which}>", columns))
        for module, names in readers.items():

            def project(out: Tensor, module: Any = module, names: list[tuple[str, slice]] = names) -> Tensor:
                out, seen = out.clone(), dict(written)
                for name, columns in names:
                    out[..., columns] = module.forward(norm1(edit(name, state[n], seen)))[..., columns]
                return out

            after(module, project)

        def heads(out: Tensor, o: Any) -> None:
            weight = o.weight if type(o).__name__ == "Conv1D" else o.weight.T
            d = weight.shape[0] // N_HEADS
            factor = part(block, row.ln1_post)(out) / out if row.ln1_post else row.multiplier
            state["before m"] = dict(written)
            for h in range(N_HEADS):
                z = state["z"][..., h * d : (h + 1) * d]
                written[f"a{n}.h{h}"] = z @ weight[h * d : (h + 1) * d] * factor

        o = part(block, row.o)
        before(o, lambda z: state.__setitem__("z", z))
        after(o, lambda out, o=o: heads(out, o))
        if row.ln2:
            before(part(block, row.ln2), lambda x: edit(f"m{n}", shaped(x), _mlp_sees(n)).reshape(x.shape))
        else:
            before(part(block, row.mlp), lambda x: norm1(edit(f"m{n}", state[n] if row.ln1 else x, _mlp_sees(n))))
        end = part(block, row.ln2_post or row.mlp_out or row.mlp)
        after(end, lambda out: written.__setitem__(f"m{n}", shaped(out) * row.multiplier))

    def _mlp_sees(n: int) -> dict[str, Tensor]:
        parallel = (row.ln1 and not row.ln2) or getattr(hf.config, "use_parallel_residual", False)
        return {u: x for u, x in written.items() if not (parallel and u.startswith(f"a{n}."))}

    for n, block in enumerate(plain.layers):
        layer(n, block)
    before(part(hf, row.final), lambda x: edit("logits", x, dict(written)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@cache
def plain(name: str) -> Plain:
    """The model as it is."""
    row = ROWS[name]
    return Plain(row, build(row), row.fused)


@cache
def ungrouped(name: str) -> Plain:
    """The same function with a key and value for every query head."""
    row, grouped = ROWS[name], plain(name)
    n_kv = grouped.n_kv()
    if n_kv == N_HEADS:
        return grouped
    alone = Plain(row, build(row, **row.many), row.fused_alone or row.fused)
    theirs, size = dict(grouped.hf.named_parameters(remove_duplicate=False)), N_HEADS // n_kv
    own = {id(alone.projection(n, w, 0)[0]) for n in range(N_LAYERS) for w in "qkv"}
    for path, module in alone.hf.named_modules():
        for key, p in module.named_parameters(recurse=False):
            full = f"{path}.{key}"
            if id(module) in own:
                continue
            if full in theirs and theirs[full].shape == p.shape and "k_layernorm" not in full:
                p.copy_(theirs[full])
            elif "k_layernorm.norms." in full:  # one per head
                head = int(full.split("norms.")[1].split(".")[0])
                p.copy_(theirs[full.replace(f"norms.{head}.", f"norms.{head // size}.")])
            else:  # a norm's weight for all keys
                p.copy_(theirs[full].unflatten(0, (n_kv, -1)).repeat_interleave(size, 0).reshape(p.shape))
    for n in range(N_LAYERS):
        for which in "qkv":
            for h in range(N_HEADS):
                source, rows = grouped.projection(n, which, h if which == "q" else h // size)
                target, place = alone.projection(n, which, h)
                target.weight[place] = source.weight[rows]
                if source.bias is not None:
                    target.bias[place] = source.bias[rows]
    return alone
