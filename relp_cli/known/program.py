"""Programs in the manner of RASP (Weiss et al. 2021): what each head and MLP reads and writes, as data.

1. The residual stream is a set of named features, each with a few dimensions. Tokens and positions put values into some.
2. A head's score is Σ strength·⟨query feature at q, key feature at k⟩ over its matches. What it attends to, by a causal
   softmax, it copies: target += scale·Σ_k P·source.
3. An MLP's neuron reads coordinates of features and writes others. Logits read the features that are there at the end.
4. The circuit follows: what is written and read on a way from a token to the logits (`truth`).

`run` is what a program means, in plain Python; `compile` makes weights of it. Nothing in a program knows of norms, rotary
embeddings or the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Coordinate = tuple[str, int]  # a feature and one of its dimensions
State = dict[str, list[float]]  # feature → its values, at one position
ONE = "one"  # the feature that is 1 everywhere
INPUT, LOGITS = "input", "logits"


@dataclass(frozen=True)
class Match:
    """strength·⟨query, key⟩, of two features of one width. without_effect: the sides ("q", "k", "qk") that may change as they
    will without a change of the pattern, because every key that is attended to gets the same.
    """

    query: str
    key: str
    strength: float
    without_effect: str = ""


@dataclass(frozen=True)
class Copy:
    """target += scale·source, of what is attended to. Both of one width."""

    source: str
    target: str
    scale: float = 1.0


@dataclass(frozen=True)
class Head:
    layer: int
    head: int
    matches: tuple[Match, ...]
    copies: tuple[Copy, ...]

    @property
    def name(self) -> str:
        return f"a{self.layer}.h{self.head}"


@dataclass(frozen=True)
class Neuron:
    """act(Σ reads + bias), times Σ gated + gated_bias in a gated MLP. without_effect: what it reads moves it between values
    at which it gives the same (it is off, say).
    """

    reads: Mapping[Coordinate, float]
    writes: Mapping[Coordinate, float]
    bias: float = 0.0
    gated: Mapping[Coordinate, float] = field(default_factory=dict)
    gated_bias: float = 1.0
    without_effect: bool = False


@dataclass(frozen=True)
class Mlp:
    layer: int
    neurons: tuple[Neuron, ...]

    @property
    def name(self) -> str:
        return f"m{self.layer}"


@dataclass(frozen=True)
class Pair:
    """Token ids of the two prompts, and of the answer and the foil at the last position."""

    original: tuple[int, ...]
    patch: tuple[int, ...]
    answer: int
    foil: int


@dataclass(frozen=True)
class Program:
    """architecture: "gpt2" (GELU, LayerNorm) or "llama" (gated SiLU, RMSNorm). features: name → width.

    tokens:    what each token puts into features. positions: what each position does, or () (llama has none).
    parts:     heads and MLPs. unembed: token → what its logit reads.
    about:     one line for people. pairs: prompts on which every part of the circuit has an effect in some pair.
    """

    name: str
    about: str
    architecture: str
    features: Mapping[str, int]
    tokens: tuple[Mapping[Coordinate, float], ...]
    unembed: Mapping[int, Mapping[Coordinate, float]]
    heads: tuple[Head, ...]
    mlps: tuple[Mlp, ...]
    pairs: tuple[Pair, ...]
    positions: tuple[Mapping[Coordinate, float], ...] = ()
    n_layers: int = 2
    n_heads: int = 4


def gelu(x: float) -> float:
    """GPT-2's: with tanh."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    """Llama's: x·σ(x)."""
    return x / (1 + math.exp(-x)) if x > -700 else 0.0


ACTIVATION = {"gpt2": gelu, "llama": silu}


def run(program: Program, tokens: Sequence[int]) -> tuple[list[float], list[State]]:
    """Logits at the last position, by token, and every feature at every position at the end, in double precision."""
    stream = [{name: [0.0] * width for name, width in program.features.items()} for _ in tokens]
    for place, token in enumerate(tokens):
        stream[place][ONE] = [1.0]
        _add(stream[place], program.tokens[token])
        _add(stream[place], program.positions[place] if program.positions else {})
    for layer in range(program.n_layers):
        written = [_attend(head, stream) for head in program.heads if head.layer == layer]
        for added in written:
            for state, values in zip(stream, added, strict=True):
                _add(state, values)
        for mlp in program.mlps:
            for state in stream if mlp.layer == layer else ():
                _add(state, _fire(program.architecture, mlp, state))
    logits = [_sum(program.unembed.get(token, {}), stream[-1]) for token in range(len(program.tokens))]
    return logits, stream


def _add(state: State, values: Mapping[Coordinate, float]) -> None:
    for (name, i), value in values.items():
        state[name][i] += value


def _sum(weights: Mapping[Coordinate, float], state: State) -> float:
    return math.fsum(weight * state[name][i] for (name, i), weight in weights.items())


def _attend(head: Head, stream: Sequence[State]) -> list[dict[Coordinate, float]]:
    out = []
    for place, state in enumerate(stream):
        seen = stream[: place + 1]
        scores = [
            math.fsum(m.strength * a * b for m in head.matches for a, b in zip(state[m.query], key[m.key], strict=True))
            for key in seen
        ]
        weights = [math.exp(score - max(scores)) for score in scores]
        added: dict[Coordinate, float] = {}
        for copy in head.copies:
            for i in range(len(state[copy.source])):
                mean = math.fsum(w * key[copy.source][i] for w, key in zip(weights, seen, strict=True)) / sum(weights)
                added[copy.target, i] = added.get((copy.target, i), 0.0) + copy.scale * mean
        out.append(added)
    return out


def _fire(architecture: str, mlp: Mlp, state: State) -> dict[Coordinate, float]:
    added: dict[Coordinate, float] = {}
    for neuron in mlp.neurons:
        value = ACTIVATION[architecture](_sum(neuron.reads, state) + neuron.bias)
        if architecture == "llama":
            value *= _sum(neuron.gated, state) + neuron.gated_bias
        for at, weight in neuron.writes.items():
            added[at] = added.get(at, 0.0) + weight * value
    return added


@dataclass(frozen=True)
class Truth:
    """The circuit: heads and MLPs, and edges `writer->reader`, both sorted."""

    nodes: tuple[str, ...]
    edges: tuple[str, ...]


def truth(program: Program) -> Truth:
    """What lies on a way from the tokens to the logits.

    Reads that their part says are `without_effect` are no way, nor are features that only positions write, which no prompt
    changes.
    """
    readers = [(LOGITS, program.n_layers, 1, frozenset(n for row in program.unembed.values() for n, _ in row))]
    writers = [(INPUT, -1, 0, frozenset(name for row in program.tokens for name, _ in row))]
    for head in program.heads:
        for side, read in _reads(head).items():
            readers.append((f"{head.name}<{side}>", head.layer, 0, read))
        writers.append((head.name, head.layer, 0, frozenset(copy.target for copy in head.copies)))
    for mlp in program.mlps:
        used = [neuron for neuron in mlp.neurons if not neuron.without_effect]
        readers.append((mlp.name, mlp.layer, 1, frozenset(f for n in used for f, _ in (*n.reads, *n.gated))))
        writers.append((mlp.name, mlp.layer, 1, frozenset(f for n in mlp.neurons for f, _ in n.writes)))
    edges = {
        (writer, reader)
        for writer, at, stage, written in writers
        for reader, to, when, read in readers
        if (at, stage) < (to, when) and written & read
    }
    down, up = _reached(edges, LOGITS, backwards=True), _reached(edges, INPUT, backwards=False)
    on_way = {(w, r) for w, r in edges if w in up and node_of(r) in down}
    nodes = {name for edge in on_way for name in (edge[0], node_of(edge[1]))} - {INPUT, LOGITS}
    return Truth(tuple(sorted(nodes)), tuple(sorted(f"{w}->{r}" for w, r in on_way)))


def node_of(reader: str) -> str:
    """`a1.h0<q>` → `a1.h0`."""
    return reader.partition("<")[0]


def _reads(head: Head) -> dict[str, frozenset[str]]:
    """Side of the head → features that it reads with an effect."""
    return {
        "q": frozenset(m.query for m in head.matches if "q" not in m.without_effect),
        "k": frozenset(m.key for m in head.matches if "k" not in m.without_effect),
        "v": frozenset(copy.source for copy in head.copies),
    }


def _reached(edges: set[tuple[str, str]], start: str, backwards: bool) -> set[str]:
    """Nodes from which, or to which, a way leads."""
    reached, before = {start}, 0
    while len(reached) > before:
        before = len(reached)
        for writer, reader in edges:
            node = node_of(reader)
            if (node if backwards else writer) in reached:
                reached.add(writer if backwards else node)
    return reached
