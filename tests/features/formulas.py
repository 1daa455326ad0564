"""Each dictionary class's formula, written from its definition, on its own tensors: state dict and x → (features, x̂)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]
D_IN, D_SAE, K = 32, 40, 5


def rand(*shape: int, seed: int = 0, scale: float = 0.4) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_state(**more: Tensor) -> State:
    return {
        "encoder.weight": rand(D_SAE, D_IN, seed=1), "encoder.bias": rand(D_SAE, seed=2),
        "decoder.weight": rand(D_IN, D_SAE, seed=3), **more,
    }  # fmt: skip


def weight_state(**more: Tensor) -> State:
    return {
        "W_enc": rand(D_IN, D_SAE, seed=1), "b_enc": rand(D_SAE, seed=2), "W_dec": rand(D_SAE, D_IN, seed=3),
        "b_dec": rand(D_IN, seed=4), **more,
    }  # fmt: skip


def keep_k(v: Tensor, k: int) -> Tensor:
    return torch.where(v >= v.sort(-1, descending=True).values[..., k - 1 : k], v, 0.0)


def relu(v: Tensor) -> Tensor:
    return torch.where(v > 0, v, 0.0)


def auto_encoder(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    f = relu((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"])
    return f, f @ s["decoder.weight"].T + s["bias"]


def auto_encoder_new(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    f = relu(x @ s["encoder.weight"].T + s["encoder.bias"])
    return f, f @ s["decoder.weight"].T + s["decoder.bias"]


def gated(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    pre = (x - s["decoder_bias"]) @ s["encoder.weight"].T
    f = (pre + s["gate_bias"] > 0) * relu(pre * s["r_mag"].exp() + s["mag_bias"])
    return f * s["decoder.weight"].norm(dim=0), f @ s["decoder.weight"].T + s["decoder_bias"]


def top_k(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    f = keep_k(relu((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"]), int(s["k"]))
    return f, f @ s["decoder.weight"].T + s["b_dec"]


def batch_top_k(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    f = relu((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"])
    f = f * (f > s["threshold"])
    return f, f @ s["decoder.weight"].T + s["b_dec"]


def jump_relu(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    pre = x @ s["W_enc"] + s["b_enc"]
    f = relu(pre * (pre > s["threshold"]))
    return f * s["W_dec"].norm(dim=1), f @ s["W_dec"] + s["b_dec"]


def matryoshka(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    f = relu((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"])
    f = f * (f > s["threshold"])
    return f, f @ s["W_dec"] + s["b_dec"]


Formula = Callable[[State, Tensor], tuple[Tensor, Tensor]]
_K, _T = torch.tensor(K), torch.tensor(0.7, dtype=torch.float64)
_VECTOR = rand(D_SAE, seed=6).abs()
LEARNING: dict[str, tuple[State, Formula]] = {
    "AutoEncoder": (linear_state(bias=rand(D_IN, seed=5)), auto_encoder),
    "AutoEncoderNew": (linear_state(**{"decoder.bias": rand(D_IN, seed=5)}), auto_encoder_new),
    "GatedAutoEncoder": (
        {k: v for k, v in linear_state(
            decoder_bias=rand(D_IN, seed=5), r_mag=rand(D_SAE, seed=7), gate_bias=rand(D_SAE, seed=8),
            mag_bias=rand(D_SAE, seed=9)).items() if k != "encoder.bias"}, gated),
    "AutoEncoderTopK": (linear_state(b_dec=rand(D_IN, seed=5), k=_K, threshold=torch.tensor(-1.0)), top_k),
    "BatchTopKSAE": (linear_state(b_dec=rand(D_IN, seed=5), k=_K, threshold=_T), batch_top_k),
    "JumpReluAutoEncoder": (weight_state(threshold=_VECTOR), jump_relu),
    "MatryoshkaBatchTopKSAE": (weight_state(threshold=_T, k=_K, group_sizes=torch.tensor([10, 30])), matryoshka),
}  # fmt: skip


def lens(config: dict[str, object], s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """SAELens: any of its architectures, scaled in and out by `scale`."""
    scale = float(config.get("scale", 1.0))  # type: ignore[arg-type]
    norms = (
        s["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(D_SAE, dtype=torch.float64)
    )
    inner = x * scale - (s["b_dec"] if config.get("apply_b_dec_to_input", True) else 0)
    if config["architecture"] == "gated":
        f = relu(inner @ (s["W_enc"] * s["r_mag"].exp()) + s["b_mag"]) * (inner @ s["W_enc"] + s["b_gate"] > 0)
    else:
        pre = (inner @ s["W_enc"] + s["b_enc"]) * norms
        f = relu(pre)
        if config["architecture"] == "topk":
            f = keep_k(f, K)
        elif config["architecture"] in ("jumprelu", "batchtopk"):
            f = f * (pre > s.get("threshold", s.get("topk_threshold")))
    return f, ((f / norms) @ s["W_dec"] + s["b_dec"]) / scale


_GATES = {"b_gate": rand(D_SAE, seed=7), "b_mag": rand(D_SAE, seed=8), "r_mag": rand(D_SAE, seed=9)}
_NO_BIAS = {k: v for k, v in weight_state().items() if k != "b_enc"}
LENS: dict[str, tuple[dict[str, object], State]] = {
    "standard": ({"architecture": "standard"}, weight_state()),
    "standard without b_dec": ({"architecture": "standard", "apply_b_dec_to_input": False}, weight_state()),
    "topk": ({"architecture": "topk", "k": K}, weight_state()),
    "topk rescaled": ({"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}, weight_state()),
    "topk scaled": (
        {"architecture": "topk", "k": K, "normalize_activations": "expected_average_only_in", "scale": 0.6}, weight_state()),
    "batchtopk": ({"architecture": "batchtopk", "k": 5.5}, weight_state(topk_threshold=_T)),
    "jumprelu": ({"architecture": "jumprelu"}, weight_state(threshold=_VECTOR)),
    "gated": ({"architecture": "gated"}, {**_NO_BIAS, **_GATES}),
}  # fmt: skip
