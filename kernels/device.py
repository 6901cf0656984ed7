"""What the kernels can run on, and the two numbers about a device that configurations depend on."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any, NamedTuple

import torch
import triton


class DeviceTraits(NamedTuple):
    """`architecture` names rows of the table in `configs`: 90, 100, or 80 for every other one from sm_80 on."""

    architecture: int
    multiprocessors: int


@functools.cache
def device_traits(device: torch.device) -> DeviceTraits:
    """The traits of a CUDA device; of an H100 for every other, where only the interpreter runs."""
    if device.type != "cuda":
        return DeviceTraits(architecture=90, multiprocessors=132)
    properties = torch.cuda.get_device_properties(device)
    architecture = {9: 90, 10: 100}.get(properties.major, 80)
    return DeviceTraits(architecture, properties.multi_processor_count)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, and what to do about it; None when they can."""
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return (
            f"the kernels need tensors on a CUDA GPU, got {device} (there only tests run them, by TRITON_INTERPRET=1)"
        )
    if torch.version.hip is not None:
        return "AMD GPUs are not supported by these configurations; use the torch backend"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{device} has compute capability {major}.{minor}, the kernels need 8.0; use the torch backend"
    return None


class _Thread(threading.local):
    has_context = False


_thread = _Thread()


def bind_context() -> None:
    """Gives the thread the context of its current device if it has none: a tensor map cannot be encoded without one.

    A thread in which autograd runs backward may have none, until a launch binds one, which is after the maps.
    """
    if _thread.has_context:
        return
    device = triton.runtime.driver.active.get_current_device()
    driver = ctypes.CDLL("libcuda.so.1")
    handle, context = ctypes.c_int(), ctypes.c_void_p()

    def call(name: str, *arguments: Any) -> None:
        code = getattr(driver, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} on CUDA device {device}: {(text.value or b'error %d' % code).decode()}")

    call("cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        call("cuDeviceGet", ctypes.byref(handle), device)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        call("cuCtxSetCurrent", context)
    _thread.has_context = True
