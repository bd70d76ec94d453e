"""The CUDA kernels on a CPU: `cuda_source` loads and launches them here where a test says so.

The sources are compiled by the C++ compiler at hand, after `translate`, with `cuda_on_cpu.h`. What
a card keeps to itself is told here: reads and writes outside the arguments, what is touched before
griddepcontrol.wait, barriers that not all threads reach. Nothing is told about speed.
"""

import ctypes
import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlorachat.kernels import cuda_source
from qlorachat.kernels.cuda_source import Argument, TileMap
from tests.kernels.emulator.translate import Parameter, translate

_HEADER = Path(__file__).parent / "cuda_on_cpu.h"
_SOURCES = Path(cuda_source.__file__).parent
_SHARED_BASE = 1024  # BASE in the header
_GUARD = 1 << 15  # bytes on either side of a tensor
_FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-ffp-contract=off"),
    *("-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-fno-stack-protector"),
)
# what no kernel of a step writes, or not where another one reads it: it may be read at once
_CONSTANT = {
    *("lora_slots", "lora_scales", "tables", "lengths", "cache_slots", "positions", "cos", "sin"),
    *("keys", "values", "packed", "absmax", "absmax2", "pairs", "table", "code", "code2"),
    *("lora_a", "lora_b", "next_lora_slots", "weight"),
}
_DTYPES = {
    "float*": (torch.float32,),
    "int*": (torch.int32,),
    "long long*": (torch.int64,),
    "u16*": (torch.bfloat16,),
}


def compiler() -> str | None:
    """The C++ compiler, where kernels run."""
    if sys.platform != "linux":
        return None
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


class Card(NamedTuple):
    """What is emulated; its name for test ids."""

    name: str
    architecture: int  # __CUDA_ARCH__
    shared_bytes: int  # that a block may have, MOST_SHARED in the header at most

    @property
    def starts_early(self) -> bool:
        return self.architecture >= 900


HOPPER = Card("Hopper", 900, 227 * 1024)
AMPERE = Card("Ampere", 860, 99 * 1024)
BLACKWELL = Card("Blackwell", 1200, 99 * 1024)


class OnCard(torch.Tensor):
    """A tensor in memory that says it is on a card, so that a launcher launches."""

    is_cuda = True


class Kernel(NamedTuple):
    code: ctypes.CDLL
    name: str
    parameters: list[Parameter]


class _Range(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("hidden", ctypes.c_int),
    )


class Emulator:
    """What stands in for a card; seed: the order in which threads and blocks run.

    Its lowest bit lets asynchronous work end late. The next one lets some warps run far ahead, and
    no thread wait for the kernel before; without it, that kernel ends as late as it may.
    """

    def __init__(self, folder: Path, sources: Path = _SOURCES) -> None:
        self.seed = 0
        self.card = HOPPER
        self.launched: list[str] = []
        self._folder = folder
        self._sources = sources
        self._build = functools.cache(self._build_anew)

    def load_kernel(
        self,
        name: str,
        kernel: str,
        device: torch.device,
        definitions: tuple[str, ...] = (),
        **of_a_card: object,
    ) -> Kernel:
        """As `cuda_source.load_kernel`. Raises RuntimeError with the compiler's words."""
        code, kernels = self._build(name, definitions, self.card)
        return Kernel(code, kernel, kernels[kernel])

    def launch(
        self,
        function: Kernel,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        device: torch.device,
        *,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        """As `cuda_source.launch`, and at its end. Raises RuntimeError with what a thread did."""
        self.launched.append(function.name)
        early = early and self.card.starts_early
        assert cluster == 1 or self.card.starts_early
        assert shared_bytes <= self.card.shared_bytes, shared_bytes
        parameters = function.parameters
        assert len(arguments) == len(parameters), (len(arguments), parameters)
        tensors = [each.rows if isinstance(each, TileMap) else each for each in arguments]
        guarded = [_Guarded(each) if isinstance(each, torch.Tensor) else None for each in tensors]
        values = [
            _value(parameter, argument, own)
            for parameter, argument, own in zip(parameters, arguments, guarded, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
        ranges = [
            _Range(own.address, own.address + own.bytes, early and each.name not in _CONSTANT)
            if own
            else _Range(None, None, 0)
            for each, own in zip(parameters, guarded, strict=True)
        ]
        code: Any = function.code
        code.on_cpu_launch.restype = ctypes.c_char_p
        error = code.on_cpu_launch(
            getattr(code, f"run_{function.name}"),
            pointers,
            (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
            *(threads, shared_bytes, cluster),
            (_Range * len(ranges))(*ranges),
            *(len(ranges), self.seed),
        )
        if error:
            raise RuntimeError(f"{function.name}: {error.decode()}")
        for parameter, own in zip(parameters, guarded, strict=True):
            if own is not None and not own.take_back():
                raise RuntimeError(f"{function.name}: a write outside {parameter.name}")

    def _build_anew(
        self, name: str, definitions: tuple[str, ...], card: Card
    ) -> tuple[ctypes.CDLL, dict[str, list[Parameter]]]:
        program = compiler()
        assert program
        given = [f"-D{each}" for each in (*definitions, f"SHARED_BASE={_SHARED_BASE}")]
        plain = _run(
            *(program, "-E", "-x", "c++", f"-D__CUDA_ARCH__={card.architecture}", *given),
            str(self._sources / name),
        )
        text, kernels = translate(plain)
        path = self._folder / f"{card.name}-{name}-{'-'.join(definitions)}.cpp"
        path.write_text(f'#include "{_HEADER}"\n{text}\n', encoding="utf-8")
        built = path.with_suffix(".so")
        _run(program, *_FLAGS, str(path), "-o", str(built))
        return ctypes.CDLL(str(built)), kernels


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("count", ctypes.c_longlong),
        ("bytes", ctypes.c_longlong),
    )


class _TensorMap(ctypes.Structure):
    """The sources' TensorMap; here it begins with where the matrix is described."""

    _fields_ = (("matrix", ctypes.POINTER(_Matrix)), ("unused", ctypes.c_ubyte * 120))


class _Guarded:
    """A copy of a tensor's memory between bytes of 0xFF, aligned as on a card."""

    def __init__(self, tensor: torch.Tensor) -> None:
        plain = tensor.as_subclass(torch.Tensor)
        extents = zip(plain.shape, plain.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in extents) if len(plain) else 0
        self._original = plain.as_strided((elements,), (1,)).view(torch.uint8)
        self.bytes = len(self._original)
        offset = plain.storage_offset() * plain.element_size() % 256
        self._memory = torch.full((self.bytes + 2 * _GUARD + 512,), 0xFF, dtype=torch.uint8)
        self._start = _GUARD + -(self._memory.data_ptr() + _GUARD) % 256 + offset
        self.address = int(self._memory.data_ptr() + self._start)
        self._own.copy_(self._original)

    @property
    def _own(self) -> torch.Tensor:
        return self._memory[self._start : self._start + self.bytes]

    def take_back(self) -> bool:
        """Copy to the tensor; whether nothing was written around it."""
        if not torch.equal(self._original, self._own):
            self._original.copy_(self._own)
        self._own.fill_(0xFF)
        return bool((self._memory == 0xFF).all())


def _value(parameter: Parameter, argument: Argument, own: _Guarded | None) -> Any:
    """The argument as C has it, of the type that the kernel declares."""
    if isinstance(argument, TileMap):
        assert parameter.type == "TensorMap", parameter
        assert own
        matrix = _Matrix(own.address, *argument.rows.shape)
        return _TensorMap(ctypes.pointer(matrix))
    if isinstance(argument, int):
        assert parameter.type == "int", parameter
        return ctypes.c_int(argument)
    if isinstance(argument, float):
        assert parameter.type == "float", parameter
        return ctypes.c_float(argument)
    assert parameter.type.endswith("*"), parameter
    if argument is None or own is None:
        return ctypes.c_void_p(None)
    assert argument.dtype in _DTYPES.get(parameter.type, (argument.dtype,)), parameter
    return ctypes.c_void_p(own.address)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
