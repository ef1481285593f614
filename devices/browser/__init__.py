"""A browser on the local network as a device: a page runs artifacts in onnxruntime-web."""

from collections.abc import Callable

from devices.device import Device


def open_device(address: str | None, name: str, say: Callable[[str], None]) -> Device:
    """Serve the page and return its browser as a device."""
    from .device import BrowserDevice

    return BrowserDevice(address, name, say)
