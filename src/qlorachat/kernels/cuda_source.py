"""CUDA C compiled by NVRTC for the card at hand, and launched through the driver."""

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch


@functools.cache
def found() -> bool:
    """Whether cuda-bindings and NVRTC are installed; else nothing here may be called."""
    try:
        if importlib.util.find_spec("cuda.bindings.nvrtc") is None:
            return False
    except ModuleNotFoundError:
        return False
    pathfinder: Any = importlib.import_module("cuda.pathfinder")
    try:
        pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except (RuntimeError, OSError):
        return False
    return True


def compile_source(name: str, architecture: str, definitions: Sequence[str]) -> bytes:
    """Machine code of the file `name` beside this one, for an architecture such as sm_90a.

    Needs no card. Raises RuntimeError with the compiler's words.
    """
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    text = resources.files(__package__).joinpath(name).read_bytes()
    program = _done(nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], []))
    flags = [f"-arch={architecture}", "-std=c++17", *(f"-D{each}" for each in definitions)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    if status.value:
        log = bytearray(_done(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile for {architecture}: {log.decode()}")
    code = bytearray(_done(nvrtc.nvrtcGetCUBINSize(program)))
    _done(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


@functools.cache
def load_kernel(
    name: str, definitions: tuple[str, ...], kernel: str, shared_bytes: int, device: torch.device
) -> Any:
    """A function of the file for one card; it may have `shared_bytes` of dynamic shared memory."""
    driver: Any = importlib.import_module("cuda.bindings.driver")
    function = _done(driver.cuModuleGetFunction(_load(name, definitions, device), kernel.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _done(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def launch(
    function: Any,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[torch.Tensor | int | float],
) -> None:
    """Launch on torch's current stream: tensors by address, int as int32, float as float32."""
    driver: Any = importlib.import_module("cuda.bindings.driver")
    values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    types = tuple(_type(argument) for argument in arguments)
    stream = torch.cuda.current_stream().cuda_stream
    _done(
        driver.cuLaunchKernel(
            function, *grid, 1, threads, 1, 1, shared_bytes, stream, (values, types), 0
        )
    )


def _type(argument: torch.Tensor | int | float) -> Any:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p
    return ctypes.c_int if isinstance(argument, int) else ctypes.c_float


@functools.cache
def _load(name: str, definitions: tuple[str, ...], device: torch.device) -> Any:
    driver: Any = importlib.import_module("cuda.bindings.driver")
    major, minor = torch.cuda.get_device_capability(device)
    code = compile_source(name, f"sm_{major}{minor}", definitions)
    with torch.cuda.device(device):
        return _done(driver.cuModuleLoadData(code))


def _done(answer: tuple[Any, ...]) -> Any:
    """What a call of the driver or of NVRTC gave, after its status."""
    status, *values = answer
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
