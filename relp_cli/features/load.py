"""`--dictionary PATH`: which dictionary stands at which site of a model.

PATH is the name of shipped dictionaries ("tiny-pythia"), a folder with one sub-folder per site, or one dictionary's folder.
A sub-folder is named by its site (`embed`, `attn_out_layer0`, `mlp_out_layer0`, `resid_out_layer0`; also `resid_0`, or a
TransformerLens hook name) and holds `ae.pt` (dictionary_learning) or `cfg.json` (SAELens), itself or in one folder below
(Marks et al.: `attn_out_layer0/10_32768/ae.pt`). SAELens folders may have any name: their hook setting says where they stand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from relp_cli.errors import RelpError, nearest
from relp_cli.features import dictionary_learning, saelens
from relp_cli.features.dictionary import Dictionary
from relp_cli.models.model import Model
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.features import sites_of
from relp_cli.spaces.sites import Site, parse_site

NO_DICTIONARY = "features need --dictionary PATH (dictionary=: a folder of sparse autoencoders, or a shipped name)"
FILES = (dictionary_learning.WEIGHTS, dictionary_learning.CONFIG, saelens.CONFIG, saelens.WEIGHTS, saelens.SCALER)
SHIPPED = Path(__file__).parent / "dictionaries"


@dataclass(frozen=True, eq=False)
class Dictionaries(Mapping[Site, Dictionary]):
    """Site → dictionary, in the order of a forward pass.

    source: the path that was asked for; digest: of their files; model: whose they say they are, where that is another one.
    Their numbers are in float32 at least, whatever the model's dtype and that of the files (`stored`).
    """

    by_site: Mapping[Site, Dictionary]
    source: str
    digest: str
    model: str | None = None

    @property
    def stored(self) -> str:
        """The dtypes of their files."""
        return ", ".join(sorted({d.stored for d in self.by_site.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(d.nbytes for d in self.by_site.values())

    def __getitem__(self, site: Site) -> Dictionary:
        return self.by_site[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(sorted(self.by_site))

    def __len__(self) -> int:
        return len(self.by_site)


def shipped_dictionaries() -> list[str]:
    """Names of the dictionaries that come with the package."""
    return sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []


def load_dictionaries(path: str | Path, model: Model) -> Dictionaries:
    """All dictionaries below a path, on the model's device.

    Raises: RelpError for a path without dictionaries, two for one site, a site or a width that the model has not, and
    whatever a folder asks for that is not supported.
    """
    root = _root(path)
    digest = hashlib.sha256()
    found: dict[Site, tuple[Dictionary, Path]] = {}
    others: list[str] = []
    for folder in dictionary_folders(root):
        site, loaded = load_one(folder, root, model)
        if site in found:
            raise RelpError(f"dictionary {root}: {found[site][1]} and {folder} are both for site {site.name}")
        found[site] = (loaded.to(model.device, model.dtype), folder)
        others += other_model(folder, model)
        for file in sorted(folder / name for name in FILES if (folder / name).is_file()):
            digest.update(f"{site.name}/{file.name}".encode() + file.read_bytes())
    by_site = {site: d for site, (d, _) in found.items()}
    return Dictionaries(by_site, str(path), digest.hexdigest()[:16], others[0] if others else None)


def check_dictionary(path: str | Path | None) -> None:
    """What can be known to be wrong before a model is loaded. Raises RelpError for no path, or one without dictionaries."""
    if path is None:
        raise RelpError(NO_DICTIONARY)
    dictionary_folders(_root(path))


def dictionaries_of(model: Model, circuits: Sequence[Circuit], where: str | Path | Dictionaries | None) -> Dictionaries:
    """The circuits' dictionaries: the given ones, or those that the circuits name.

    Raises: RelpError where they, or the model, are not what the circuits were found with.
    """
    meta = circuits[0].meta
    where = where if where is not None else meta.get("dictionary")
    if where is None:
        raise RelpError("this circuit does not say its dictionary; give dictionary=PATH")
    found = where if isinstance(where, Dictionaries) else load_dictionaries(where, model)
    for c in circuits:
        for what, mine in (("model", model.name), ("revision", model.revision), ("dictionary_hash", found.digest)):
            if c.meta.get(what, mine) != mine:
                raise RelpError(f"this circuit was found with {what.replace('_', ' ')} '{c.meta[what]}', not '{mine}'")
        sites = sites_of(c.units)
        if dict(zip(sites.sites, sites.sizes, strict=True)) != {s: d.n_features for s, d in found.items()}:
            raise RelpError(f"circuit: its sites and numbers of features are not those of dictionary {found.source}")
    return found


def _root(path: str | Path) -> Path:
    if str(path) in shipped_dictionaries():
        return SHIPPED / str(path)
    if not str(path):
        raise RelpError(
            f"dictionary: expected a folder or one of {', '.join(shipped_dictionaries())}, got an empty name"
        )
    root = Path(path).expanduser()
    if not root.is_dir():
        raise RelpError(
            f"dictionary '{path}' is neither a folder nor shipped{nearest(str(path), shipped_dictionaries())}"
        )
    return root


def dictionary_folders(root: Path) -> list[Path]:
    """Folders at or below `root` that hold one dictionary. Raises RelpError where there are none."""
    holders = (dictionary_learning.WEIGHTS, saelens.CONFIG, saelens.WEIGHTS)
    found = {file.parent for name in holders for file in root.rglob(name)}
    # A hidden folder is one that is still being written.
    folders = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(root).parts))
    if not folders:
        raise RelpError(
            f"dictionary {root}: no folder in it has {dictionary_learning.WEIGHTS} (dictionary_learning) or "
            f"{saelens.CONFIG} with {saelens.WEIGHTS} (SAELens)"
        )
    return folders


def load_one(folder: Path, root: Path, model: Model) -> tuple[Site, Dictionary]:
    """One folder's dictionary and its site, checked against the model.

    Raises: RelpError where neither its folder's name nor its hook setting names a site, or where they name two.
    """
    named = [parse_site(part) for part in (*folder.relative_to(root.parent).parts,)]
    site = next((s for s in reversed(named) if s), None)
    hook: str | None = None
    try:
        if (folder / dictionary_learning.WEIGHTS).is_file():
            said_in = dictionary_learning.CONFIG
            loaded, said = dictionary_learning.load_dictionary_learning(folder)
        else:
            said_in = saelens.CONFIG
            loaded, hook = saelens.load_saelens(folder)
            said = parse_site(hook) if hook else None
    except RelpError:
        raise
    except Exception as error:  # files from anywhere: whatever does not fit is the folder's fault, and is said of it
        reason = (str(error).splitlines() or [""])[0]
        raise RelpError(
            f"dictionary {folder}: its files do not fit together ({type(error).__name__}: {reason})"
        ) from error
    if site and said and site != said:
        raise RelpError(f"dictionary {folder}: the folder's name says site {site.name}, {said_in} says {said.name}")
    site = site or said
    if site is None:
        raise RelpError(f"dictionary {folder}: for which site is it? Name its folder 'embed', 'attn_out_layer0', …")
    if site.kind == "embed" and "pos_embed.hook_out" in model.points and hook != "blocks.0.hook_resid_pre":
        raise RelpError(f"dictionary {folder}: model {model.name} adds position embeddings, so 'embed' is not what its "
                        "first block reads; only a dictionary of blocks.0.hook_resid_pre is")  # fmt: skip
    _check(folder, site, loaded, model)
    return site, loaded


def other_model(folder: Path, model: Model) -> list[str]:
    """[the model that a folder names as its own], where that is not this one; [] for folders that do not say.

    Ours say their model's revision: NAME@REVISION is a model of the same name with other weights. Others' names are matched
    loosely ("gpt2-small" and "gpt2" are the same).
    """
    if (folder / dictionary_learning.WEIGHTS).is_file():
        name, revision = dictionary_learning.settings(folder).get("lm_name") or "", ""
    else:
        name, revision = saelens.owner(folder)
    if revision:
        told = f"{name}@{revision}" if name == model.name else name
        return [told] if revision != model.revision else []
    theirs, mine = (n.rpartition("/")[2].lower() for n in (name, model.name))
    return [name] if theirs and theirs not in mine and mine not in theirs else []


def _check(folder: Path, site: Site, d: Dictionary, model: Model) -> None:
    if site.layer >= model.shape.n_layers:
        raise RelpError(
            f"dictionary {folder} is for {site.name}, but model {model.name} has {model.shape.n_layers} layers"
        )
    want, width = model.shape.d_model, d.n_features
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "W_enc": (d.w_enc, (want, width)), "W_dec": (d.w_dec, (width, want)), "b_dec": (d.b_dec, (want,)),
        "b_in": (d.b_in, (want,)),
    }  # fmt: skip
    vectors = ("b_enc", "threshold", "f_scale", "gate_bias", "mag_scale", "mag_bias")
    shapes |= {name: (getattr(d, name), (width,)) for name in vectors}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise RelpError(
                f"dictionary {folder}: {name} has shape {list(tensor.shape)}, site {site.name} of model {model.name} "
                f"needs {list(shape)} (d_model {want})"
            )
    if not width:
        raise RelpError(f"dictionary {folder} has no features")
    if d.k is not None and not 0 < d.k <= width:
        raise RelpError(f"dictionary {folder}: k = {d.k}, expected 1 to {width} (its number of features)")
    # After scalings are folded in: finite numbers can give others (the exponential of r_mag, a row of zeros' norm).
    finite = ("w_enc", "b_enc", "w_dec", "b_dec", "b_in", "f_scale", "gate_bias", "mag_scale", "mag_bias")
    for name in (n for n in finite if getattr(d, n) is not None and not getattr(d, n).isfinite().all()):
        raise RelpError(f"dictionary {folder}: {name} holds values that are not finite")
