"""`with lrp(model, rules):` — forward passes inside the block have the model's values and the rules' gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.attention import masked
from relp_cli.lrp.rules import parse_rules
from relp_cli.lrp.site import RuleSite, replace
from relp_cli.lrp.sites import build_sites
from relp_cli.models.checks import TOLERANCE
from relp_cli.models.model import Hook, Model

Recorded = dict[str, dict[str, Tensor]]  # site name → the patch run's values


@contextmanager
def lrp(
    model: Model, rules: Sequence[str], other: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Iterator[dict[str, int]]:
    """Apply LRP rules as forward hooks; yields rule → number of layers it acts on. Hooks are gone on exit, always.

    other: what `recording` collected in the patch run; two-point rules need it.

    Raises: RelpError for a rule that matches no layer, two rules for one kind of site, a two-point rule without
    `other`, in the first pass, a site whose value is not what the rule replaces, and (on exit) a site that a forward pass
    went past without calling.
    """
    active = parse_rules(list(rules))
    lonely = [str(a) for a in active if a.rule.two_point and other is None]
    if lonely:
        raise RelpError(f"two-point rules ({', '.join(lonely)}) need a patch prompt; this run has none")
    sites = build_sites(model, active)
    fired: set[str] = set()
    inputs: dict[str, dict[str, Tensor]] = {site.name: {} for site in sites}

    def write(site: RuleSite) -> Hook:
        def hook(value: Tensor) -> Tensor:
            fired.add(site.name)
            read = dict(inputs[site.name])
            inputs[site.name].clear()  # no layer's activations wait for the next pass
            if not torch.is_grad_enabled():
                return value
            _must_have_read(model, site, read)
            theirs = other[site.name] if other else None
            _must_stand_for(model, site, read, value, theirs)
            return replace(value, site.surrogate(read, value, theirs))

        return hook

    def begin(_: Tensor) -> None:
        """What the last pass read too late (GPT-J's pattern) must not stand there, stale, for this one."""
        for read in inputs.values():
            read.clear()

    # Writes before reads: where one rule reads the point that another writes, it must read what was written.
    hooks: list[tuple[str, Hook]] = [("blocks.0.hook_in", begin), *((site.write, write(site)) for site in sites)]
    hooks += _reads(sites, inputs)
    with model.hooks(hooks):
        yield {str(a): sum(str(a) in site.rules for site in sites) for a in active}
    silent = [site.name for site in sites if fired and site.name not in fired]
    if silent:
        raise RelpError(f"model {model.name}: rules were not applied at {', '.join(silent[:3])} ({len(silent)} layers)")


@contextmanager
def recording(model: Model, rules: Sequence[str]) -> Iterator[Recorded]:
    """Collect, during the patch run's forward pass, what the two-point rules among `rules` need of it."""
    active = list(parse_rules(list(rules)))
    if not any(a.rule.two_point for a in active):
        yield {}
        return
    # All sites, since a one-point rule may share a site with a two-point one (Half beside act2).
    sites = build_sites(model, active)
    inputs: dict[str, dict[str, Tensor]] = {site.name: {} for site in sites}
    recorded: Recorded = {}
    beside = [(point, _keep(inputs[site.name], key)) for site in sites for key, point in site.beside.items()]
    with model.hooks([*_reads(sites, inputs), *beside]):
        yield recorded
    for site in sites:
        _must_have_read(model, site, inputs[site.name])
        recorded[site.name] = {k: v.detach() for k, v in site.record(inputs[site.name]).items()}


def _must_have_read(model: Model, site: RuleSite, values: Mapping[str, Tensor]) -> None:
    silent = [point for key, point in site.reads.items() if key not in values]
    if silent:
        raise RelpError(
            f"model {model.name} ({model.family.name}) never calls {', '.join(silent)}, "
            f"which rule {', '.join(site.rules)} reads; leave the rule out"
        )


_compared: WeakKeyDictionary[Model, set[tuple[str, tuple[str, ...]]]] = WeakKeyDictionary()


def _must_stand_for(
    model: Model, site: RuleSite, read: Mapping[str, Tensor], value: Tensor, other: Mapping[str, Tensor] | None
) -> None:
    """Once per model, site and its rules in a process: what stands there is what the surrogate was made for.

    A wrong surrogate changes gradients and never values, so nothing else would show it.
    """
    done, key = _compared.setdefault(model, set()), (site.name, site.rules)
    if key in done:
        return
    with torch.no_grad():
        want = site.value(read, other)
        seen = ~masked(value)
        error = ((want - value)[seen].abs().max() / value[seen].abs().max().clamp_min(1e-6)).item()
    if not error <= TOLERANCE[model.dtype]:
        raise RelpError(
            f"model {model.name} ({model.family.name}): {site.name} does not compute what rule {', '.join(site.rules)} "
            f"replaces (relative error {error:.1e} > {TOLERANCE[model.dtype]:.0e}); leave the rule out"
        )
    done.add(key)


def _reads(sites: list[RuleSite], inputs: dict[str, dict[str, Tensor]]) -> list[tuple[str, Hook]]:
    return [(point, _keep(inputs[site.name], key)) for site in sites for key, point in site.reads.items()]


def _keep(inputs: dict[str, Tensor], key: str) -> Hook:
    return lambda value: inputs.__setitem__(key, value)
