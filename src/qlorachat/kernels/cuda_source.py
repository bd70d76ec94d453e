"""CUDA C compiled by NVRTC for the card at hand, and launched through the driver."""

import ctypes
import functools
import hashlib
import importlib
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import resources
from typing import Any, NamedTuple

import torch

from qlorachat.durable import write_whole
from qlorachat.errors import ConfigError
from qlorachat.kernels.device import is_hopper, starts_early
from qlorachat.user_cache import cache_root

log = logging.getLogger(__name__)

HEADERS = (
    *("attend.cuh", "attend_16_bits.cuh", "attend_16_bits_grouped.cuh"),
    *("attend_16_bits_single.cuh", "attend_8_bits.cuh", "common.cuh", "lora.cuh"),
    *("lora_between.cuh", "nf4.cuh", "nf4_matmul.cuh", "sums.cuh"),
)

# How a Hopper processor splits its 256 kB in a fused step, in % of the most that shared memory may
# have: one split for every kernel, so that none waits for another.
STEP_SHARED = 100


@functools.cache
def found() -> bool:
    """Whether cuda-bindings and NVRTC are installed; else nothing here may be called."""
    try:
        importlib.import_module("cuda.bindings.nvrtc")
        pathfinder: Any = importlib.import_module("cuda.pathfinder")
        pathfinder.load_nvidia_dynamic_lib("nvrtc")
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def architecture(device: torch.device) -> str:
    """What NVRTC calls a card: sm_90a has instructions that no other card has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if is_hopper(device) else "")


def compile_source(name: str, architecture: str, definitions: Sequence[str]) -> bytes:
    """Machine code of the file `name` beside this one, for an architecture such as sm_90a.

    Needs no card. Raises RuntimeError with the compiler's words.
    """
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    headers = ([_read(each) for each in HEADERS], [each.encode() for each in HEADERS])
    program = _done(nvrtc.nvrtcCreateProgram(_read(name), name.encode(), len(HEADERS), *headers))
    flags = [f"-arch={architecture}", "-std=c++17", *(f"-D{each}" for each in definitions)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    if status.value:
        log = bytearray(_done(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile for {architecture}: {log.decode()}")
    code = bytearray(_done(nvrtc.nvrtcGetCUBINSize(program)))
    _done(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


def machine_code(
    name: str, architecture: str, definitions: Sequence[str], *, anew: bool = False
) -> bytes:
    """What `compile_source` makes, from the user's cache if it was made before, unless `anew`."""
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    compiler = (nvrtc.nvrtcVersion(), architecture, *definitions)
    texts = [_read(each) for each in (name, *HEADERS)]
    made_of = hashlib.sha256(b"".join((*texts, repr(compiler).encode())))
    try:
        path = cache_root() / "kernels" / f"{name}-{architecture}-{made_of.hexdigest()[:32]}.cubin"
    except ConfigError as error:
        log.info("the compiled kernels can't be kept: %s", error)
        return compile_source(name, architecture, definitions)
    try:
        if not anew:
            return path.read_bytes()
    except OSError:
        pass
    log.info("compiling the kernels of %s for %s, once", name, architecture)
    code = compile_source(name, architecture, definitions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, code)
    except OSError as error:
        log.info("the compiled kernels can't be kept: %s", error)
    return code


def _read(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()


def load(names: Sequence[str], device: torch.device, definitions: tuple[str, ...] = ()) -> None:
    """Compile and load whole sources. Raises RuntimeError, OSError."""
    for name in names:
        _load(name, find_shared_base(device), device, definitions)


@functools.cache
def load_kernel(
    name: str,
    kernel: str,
    device: torch.device,
    definitions: tuple[str, ...] = (),
    shared_percent: int | None = None,
) -> Any:
    """A function of the file `name` for one card, with as much shared memory as it may want.

    shared_percent: how a processor is to split its memory, as `STEP_SHARED`; None: the driver
    decides.
    """
    module = _load(name, find_shared_base(device), device, definitions)
    return _function(module, kernel, shared_bytes(device), shared_percent)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Dynamic shared memory that one block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def is_roomy(device: torch.device) -> bool:
    """Whether a block may have far more shared memory than 99 kB: on Hopper and the A100."""
    return shared_bytes(device) >= 160 * 1024


@functools.cache
def find_shared_base(device: torch.device) -> int:
    """Where dynamic shared memory begins, a constant to the sources; waits for the card."""
    base = torch.zeros(1, dtype=torch.int32, device=device)  # first: the driver needs a context
    module = _load("shared_base.cu", 0, device, ())
    function = _function(module, "find_shared_base", 0)
    launch(function, (1,), 1, 1024, [base], device)
    return int(base)


class TileMap(NamedTuple):
    """A matrix of bytes for tensor copies: the sources' TensorMap. Only on Hopper.

    Copies take boxes of 64 rows by 128 bytes, which land swizzled by 128 bytes, zeros past the
    edges. rows: uint8 [rows, bytes], contiguous; bytes is a multiple of 16.
    """

    rows: torch.Tensor


Argument = torch.Tensor | TileMap | int | float | None


def launch(
    function: Any,
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Argument],
    device: torch.device,
    *,
    early: bool = False,
    cluster: int = 1,
) -> None:
    """Launch on torch's current stream.

    Tensors go by address, int as int32, float as float32, None as a null pointer.

    early: it waits by itself for the kernel before it, and starts earlier on cards that know that
    (programmatic dependent launch). cluster: neighbours along the grid's first axis; only where
    `device.starts_early`.
    """
    current = torch.cuda.current_device()
    index = current if device.index is None else device.index
    config = _launch_config(
        *(*grid, *(1,) * (3 - len(grid))),
        threads=threads,
        shared_bytes=shared_bytes,
        stream=torch._C._cuda_getCurrentRawStream(index),
        early=early and starts_early(device),
        cluster=cluster,
    )
    arguments_and_types = tuple(zip(*map(_typed, arguments), strict=True))
    with nullcontext() if index == current else torch.cuda.device(index):
        _done(_driver().cuLaunchKernelEx(config, function, arguments_and_types, 0))


@functools.lru_cache(4096)
def _launch_config(
    x: int,
    y: int,
    z: int,
    *,
    threads: int,
    shared_bytes: int,
    stream: int,
    early: bool,
    cluster: int,
) -> Any:
    """Kept: nothing of it changes from one launch to the next."""
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = stream
    attributes = []
    if early:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = _attribute("PROGRAMMATIC_STREAM_SERIALIZATION")
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    if cluster > 1:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = _attribute("CLUSTER_DIMENSION")
        size = attributes[-1].value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def _attribute(name: str) -> Any:
    return getattr(_driver().CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")


@functools.cache
def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _typed(argument: Argument) -> tuple[Any, Any]:
    """A value and its type; None: the bindings take the value's own bytes."""
    if isinstance(argument, int):  # most are
        return argument, ctypes.c_int
    if isinstance(argument, float):
        return argument, ctypes.c_float
    if isinstance(argument, TileMap):
        return _encode(argument.rows.data_ptr(), *argument.rows.shape), None
    return 0 if argument is None else argument.data_ptr(), ctypes.c_void_p


@functools.lru_cache(4096)
def _encode(address: int, rows: int, row_bytes: int) -> Any:
    driver = _driver()
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    return _done(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            *(2, address),
            *([wide(row_bytes), wide(rows)], [wide(row_bytes)]),
            *([narrow(128), narrow(64)], [narrow(1), narrow(1)]),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


@functools.cache
def _load(
    name: str,
    shared_base: int,
    device: torch.device,
    definitions: tuple[str, ...],
) -> Any:
    driver = _driver()
    own = (f"SHARED_BASE={shared_base}", *definitions)
    with torch.cuda.device(device):
        code = machine_code(name, architecture(device), own)
        answer = driver.cuModuleLoadData(code)
        if answer[0].value:  # what was kept may be damaged
            code = machine_code(name, architecture(device), own, anew=True)
            answer = driver.cuModuleLoadData(code)
        return _done(answer)


def _function(
    module: Any, kernel: str, most_shared_bytes: int, shared_percent: int | None = None
) -> Any:
    driver = _driver()
    function = _done(driver.cuModuleGetFunction(module, kernel.encode()))
    attributes = driver.CUfunction_attribute
    if most_shared_bytes:
        static = _done(
            driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        )
        most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _done(driver.cuFuncSetAttribute(function, most, most_shared_bytes - static))
    if shared_percent is not None:
        hint = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _done(driver.cuFuncSetAttribute(function, hint, shared_percent))
    return function


def _done(answer: tuple[Any, ...]) -> Any:
    """What a call of the driver or of NVRTC gave, after its status."""
    status, *values = answer
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
