"""Model families as data (paper Table 4): which LRP rules each family's preset applies, and the activations that rules know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from relp_cli.registry import Registry


@dataclass(frozen=True)
class Family:
    """One row of paper Table 4. `model_types` are Hugging Face `config.model_type` values."""

    name: str
    model_types: tuple[str, ...]
    rules: tuple[str, ...]
    source: str = "RelP Table 4"


UNGATED = ("ln", "identity")  # the 0-rule on linear layers is the plain gradient and needs no hook
GATED = ("ln", "identity", "half")

FAMILIES: Registry[Family] = Registry("family")
for _row in (
    Family("gpt2", ("gpt2",), UNGATED),
    Family("pythia", ("gpt_neox",), UNGATED),
    Family("qwen2", ("qwen2",), GATED),
    Family("gemma2", ("gemma2",), GATED),
    Family("llama", ("llama",), GATED, "as Qwen2 (gated MLP); not in Table 4"),
):
    FAMILIES.add(_row.name, _row)


def family_of(model_type: str, gated: bool) -> Family:
    """The row for a Hugging Face model type; other types get the rules that their MLP's form calls for."""
    for _, row in FAMILIES.items():
        if model_type in row.model_types:
            return row
    rules = GATED if gated else UNGATED
    return Family(model_type, (model_type,), rules, "detected: " + ("gated" if gated else "ungated") + " MLP")


@dataclass(frozen=True)
class Activation:
    """act(x) and its exact ratio act(x)/x (finite at 0), which is what the Identity-rule holds constant."""

    fn: Callable[[Tensor], Tensor]
    ratio: Callable[[Tensor], Tensor]


def _gelu_tanh_ratio(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_GELU = Activation(F.gelu, lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))))
_GELU_TANH = Activation(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_ratio)
_SILU = Activation(F.silu, torch.sigmoid)
_RELU = Activation(F.relu, lambda x: (x > 0).to(x.dtype))

# Hugging Face `hidden_act` / `activation_function` names.
ACTIVATIONS: Registry[Activation] = Registry("activation")
for _name, _act in {
    "gelu": _GELU,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "silu": _SILU,
    "swish": _SILU,
    "relu": _RELU,
}.items():
    ACTIVATIONS.add(_name, _act)
