"""Where a model's weights are: on one device, or by a device map. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relp_cli.errors import RelpError, unknown

DEVICE_MAPS = ("auto", "balanced", "offload")


def check_device_map(device_map: str, where: str = "") -> str:
    """Raises RelpError, naming the nearest one, for a name that is no device map's."""
    if device_map not in DEVICE_MAPS:
        raise unknown("device map", device_map, DEVICE_MAPS, where=where)
    return device_map


def placed(device: str | None, device_map: str | None) -> str | None:
    """The one place that both options name: a device, a device map, or neither. Raises RelpError for both."""
    if device is not None and device_map is not None:
        raise RelpError(
            f"--device {device} and --device-map {device_map} both say where the model is: give one of them"
        )
    return device if device_map is None else check_device_map(device_map, "--device-map: ")


def arguments(place: str | None) -> dict[str, Any]:
    """What `placed` returned, as arguments of `load_model`."""
    return {"device_map" if place in DEVICE_MAPS else "device": place}


def written(device_map: str | Mapping[str, Any]) -> str:
    """A device map as metadata have it: its name, or how many modules are where (`cpu: 12, disk: 28`)."""
    if isinstance(device_map, str):
        return device_map
    places = [str(place) for place in device_map.values()]
    return ", ".join(f"{place}: {places.count(place)}" for place in dict.fromkeys(places))
