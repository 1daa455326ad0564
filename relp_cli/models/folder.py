"""Local model folders and GGUF files: what is in them, refused where it would be ignored or run, and a hash of all that
determines a number.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

from relp_cli.errors import RelpError, nearest
from relp_cli.files import read_object
from relp_cli.models.catalog import EMBEDDED, embedded_names

# These patterns and names decide what a model computes, and on which tokens. An index says which file a weight is read from.
PATTERNS = ("*.safetensors", "*.bin", "*.index.json", "*.model")
DECIDING = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
HUB_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
FLOATS = {"F64", "F32", "F16", "BF16"}
BUFFERS = ("position_ids", "attn.bias", "masked_bias", "inv_freq")  # no weights, whatever their dtype


def split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """`gpt2@main` → ("gpt2", "main"); names of local folders stay whole. Raises RelpError for two revisions."""
    before, at, after = name.rpartition("@")
    if not at or Path(name).expanduser().exists():
        return name, revision
    if not before or not after or revision not in (None, after):
        raise RelpError(f"model '{name}': expected NAME or NAME@REVISION, with one revision")
    return before, after


def local_path(name: str) -> Path | None:
    """The folder of an embedded name or a path, or a .gguf file; None for a hub name.

    Raises: RelpError for a folder that is none of a model, or whose weights or configuration would be passed over.
    """
    if name in embedded_names():
        return EMBEDDED / name
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        if find_spec("gguf") is None:
            raise RelpError(f"model '{name}': reading GGUF files needs the package gguf: pip install 'relp-cli[gguf]'")
        return path
    if path.is_dir():
        _check(name, path)
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise RelpError(f"model {'file' if path.suffix == '.gguf' else 'folder'} '{name}' does not exist")
    if path.is_file():
        raise RelpError(f"model '{name}' is a file; expected a Hugging Face model folder, or a .gguf file")
    if not HUB_NAME.fullmatch(name):
        raise RelpError(
            f"model '{name}' is no embedded model, local folder or hub name{nearest(name, embedded_names())}"
        )
    return None


def _check(name: str, folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise RelpError(
            f"model folder '{name}' holds an adapter (adapter_config.json), which would be ignored; merge it into the "
            "weights first (peft: merge_and_unload)"
        )
    if not (folder / "config.json").is_file():
        raise RelpError(f"model folder '{name}' has no config.json; expected a Hugging Face model folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("pytorch_model*.bin")):
        raise RelpError(f"model folder '{name}' has no weights (*.safetensors or pytorch_model*.bin)")
    config = read_object(folder / "config.json")
    if "quantization_config" in config:
        kind = config["quantization_config"]
        method = kind.get("quant_method", "unknown") if isinstance(kind, dict) else "unknown"
        raise RelpError(f"model folder '{name}': its weights are quantised ({method}); dequantise them first")
    for file in weights:
        for key, dtype in _dtypes(file).items():
            if dtype not in FLOATS and not key.endswith(BUFFERS):
                raise RelpError(
                    f"model folder '{name}': {file.name}: weight '{key}' is {dtype}, expected floating point"
                )


def _dtypes(file: Path) -> dict[str, str]:
    """Tensor → dtype of a safetensors file; {} for one that is damaged, which loading it will say."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if size < 1 << 27 else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: str(v["dtype"]) for k, v in header.items() if isinstance(v, dict) and "dtype" in v}


def content_hash(path: Path) -> str:
    """sha256 over the names and bytes of weights, configuration and tokenizer: what makes two local models the same."""
    digest = hashlib.sha256()
    matching = [file for pattern in PATTERNS for file in path.glob(pattern)]
    files = [path] if path.is_file() else [*matching, *map(path.joinpath, DECIDING)]
    for file in sorted(f for f in files if f.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]
