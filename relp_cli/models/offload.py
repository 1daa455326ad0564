"""Models whose weights are not all on one device: how they are placed, and the one way to read a weight.

1. Transformers and accelerate place the modules by a device map (`device_map_of` makes the one of `offload`), and the model is
   never moved afterwards.
2. A module whose weights are on the disk, or in main memory beside a GPU, has them on "meta" between its calls; `Fetched`, which
   takes the place of accelerate's hook, brings them for a call (`adopt`).
3. What autograd keeps of a forward pass for its backward pass are weights as well. `forgetting` keeps their names instead and
   brings them again: so a pass holds one module's weights at a time in both directions, and computes the same numbers.
4. `parameter` reads a weight wherever it is. Everything outside of a module's own call reads weights through it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from typing import Any
from weakref import finalize, ref

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import get_max_memory, send_to_device
from torch import Tensor, nn

from relp_cli.errors import RelpError, nearest

Storage = int
_there: dict[Storage, tuple[ref[Tensor], Fetched, str]] = {}  # fetched weights that something still holds


class Fetched(AlignDevicesHook):
    """The hook of a module whose weights are elsewhere between its calls. Unlike accelerate's own

    - it fetches once where calls nest (TransformerLens aligns a module around the module's own call);
    - what it fetches is a copy in memory of its own: products with it are those of a plain model, to the last bit, and the
      file's pages need not stay mapped;
    - fetched weights are known by their storage, so that `forgetting` recognises them.
    """

    def __init__(self, module: nn.Module, hook: AlignDevicesHook) -> None:
        super().__init__()
        self.__dict__.update(vars(hook))
        self.away = dict(module._parameters)  # on "meta"
        self.last: dict[str, ref[Tensor]] = {}

    def fetch(self, name: str) -> Tensor:
        """A weight on the device where the module runs."""
        known = self.last[name]() if name in self.last else None
        if known is not None:
            return known
        away, stored = self.away[name], self.weights_map[name]
        assert away is not None
        value = _room(away, torch.device(self.execution_device), stored.data_ptr() % 64).copy_(stored)
        there = nn.Parameter(value, requires_grad=False)
        at = value.untyped_storage().data_ptr()
        self.last[name] = ref(there)
        _there[at] = ref(there, partial(_gone, at)), self, name
        return there

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for name, value in self.away.items():
            if value is not None:
                module._parameters[name] = self.fetch(name)  # type: ignore[assignment]
        moved = partial(send_to_device, device=self.execution_device)
        return moved(args), moved(kwargs, skip_keys=self.skip_keys)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        module._parameters.update(self.away)
        return output


def _room(like: Tensor, device: torch.device, begins: int) -> Tensor:
    """An empty tensor on the device. In main memory it is pages of its own, which go back to the system with it: blocks of the
    heap, taken and freed for every call, would leave it in pieces.

    begins: how many bytes behind a cache line. A plain model's weights lie where its file has them, and products of few rows
    are summed in an order that depends on it.
    """
    if device.type != "cpu" or not like.numel():
        return torch.empty(like.shape, dtype=like.dtype, device=device)
    pages = mmap(-1, 64 + like.numel() * like.element_size())
    return torch.frombuffer(pages, dtype=like.dtype, count=like.numel(), offset=begins).view(like.shape)


def _gone(at: Storage, held: ref[Tensor]) -> None:
    if at in _there and _there[at][0] is held:
        del _there[at]


def device_map_of(empty: Any, device: torch.device) -> dict[str, Any]:
    """The device map of `offload`: the matrices of the blocks are fetched for each call, everything else is on `device`. They
    wait in main memory beside a GPU, as far as they fit there; otherwise on the disk. empty: the model on "meta".
    """
    at = (
        "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    )  # a name, for safetensors reads onto it
    room = get_max_memory()["cpu"] if device.type != "cpu" else 0
    places: dict[str, Any] = {}
    for path, module in empty.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not own:
            continue
        # A module of matrices and of others that it holds goes with them: a map's places are of a module and what is below.
        inside = any(part.isdigit() for part in path.split(".")) and any(p.ndim > 1 for p in module.parameters())
        places[path] = at
        if inside:
            room -= sum(p.numel() * p.element_size() for p in own)
            places[path] = "cpu" if room > 0 else "disk"
    return places


def check_modules(places: Mapping[str, Any], empty: Any) -> None:
    """Raises RelpError for a module that the model does not have."""
    known = {path for path, _ in empty.named_modules()} | {path for path, _ in empty.named_parameters()}
    for path in places:
        if path not in known:
            raise RelpError(f"device_map: the model has no module '{path}'{nearest(path, known)}")


class Spare:
    """A folder for weights that cannot be read from the model's own files as they are, below $TMPDIR; gone when this is."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="relp-offload-")
        finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def is_placed(hf: nn.Module) -> bool:
    """Whether accelerate has placed the model's modules, so that it cannot be moved."""
    return isinstance(getattr(hf, "_hf_hook", None), AlignDevicesHook)


def adopt(hf: nn.Module) -> None:
    """Put `Fetched` in place of accelerate's own hooks. Vectors (norms, with biases of nothing else) are fetched for good: they
    are small, and read in many places.
    """
    for module in hf.modules():
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, Fetched) or not isinstance(hook, AlignDevicesHook) or not hook.offload:
            continue
        new = Fetched(module, hook)
        if all(p is None or p.ndim < 2 for p in new.away.values()):
            for name, value in new.away.items():
                module._parameters[name] = None if value is None else new.fetch(name)  # type: ignore[assignment]
            hook.offload = False
        else:
            module._hf_hook = new


def device_of(hf: Any) -> torch.device:
    """The device that token ids go to."""
    embedding = hf.get_input_embeddings()
    while hasattr(embedding, "original_component"):
        embedding = embedding.original_component
    hook = getattr(embedding, "_hf_hook", None)
    return torch.device(embedding.weight.device if hook is None else hook.execution_device)


def devices_of(hf: nn.Module) -> set[torch.device]:
    """The devices that modules run on."""
    hooks = (getattr(module, "_hf_hook", None) for module in hf.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return {torch.device(device) for device in devices if device is not None}


def parameter(module: Any, name: str, like: Tensor | torch.device) -> Tensor | None:
    """A parameter of a module, or of a bridge component around one, on the device of `like`; None where it has none.

    Float of the module's own shape; fetched where it is elsewhere.
    """
    device = like if isinstance(like, torch.device) else like.device
    value: Tensor | None = getattr(module, name, None)
    if value is not None and value.is_meta:
        while hasattr(module, "original_component"):
            module = module.original_component
        value = module._hf_hook.fetch(name)
    return None if value is None else value.to(device)


def named_weights(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its name, one at a time, wherever it is."""
    modules = dict(hf.named_modules(remove_duplicate=False))
    for path, value in hf.named_parameters():
        owner, _, name = path.rpartition(".")
        found = parameter(modules[owner], name, torch.device("cpu")) if value.is_meta else value
        if found is not None:
            yield path, found


def resident(hf: nn.Module) -> int:
    """Bytes of weights that are in memory at once: those that stay, and the largest of those that are fetched."""
    sizes: tuple[list[int], list[int]] = ([], [0])
    for value in hf.parameters():
        sizes[value.is_meta].append(value.numel() * value.element_size())
    return sum(sizes[0]) + max(sizes[1])


@dataclass(frozen=True)
class _Absent:
    """A weight, or a view of one, that a graph holds by name."""

    hook: Fetched
    name: str
    view: tuple[Any, Any, Any]


def held(value: Tensor) -> Any:
    """What a graph holds for a tensor: a fetched weight's name, or the tensor."""
    at = value.untyped_storage().data_ptr()
    if at not in _there:
        return value.detach()  # itself, an output would hold its own graph
    _, hook, name = _there[at]
    return _Absent(hook, name, (value.shape, value.stride(), value.storage_offset()))


def restored(kept: Any) -> Tensor:
    """The tensor that `held` was given."""
    if isinstance(kept, _Absent):
        return kept.hook.fetch(kept.name).as_strided(*kept.view)
    value: Tensor = kept
    return value


def forgetting() -> AbstractContextManager[Any]:
    """Graphs that are made inside hold no fetched weights; a backward pass fetches them again."""
    return torch.autograd.graph.saved_tensors_hooks(held, restored)
