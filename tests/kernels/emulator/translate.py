"""CUDA C as C++: inline PTX becomes calls, shared memory and kernels what `cuda_on_cpu.h` offers.

The source is preprocessed. Each PTX instruction becomes a call of the function that has its name in
the header, so one that the header lacks does not compile.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_ASM = re.compile(r"\basm\b(?:\s+volatile\b)?\s*\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?u8\s+shared\[\];")
_STATIC = re.compile(r"__shared__\s+(\w+)\s+(\w+);")
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__\w+__\([^)]*\)\s+)?(\w+)\(([^)]*)\)\s*\{'
)
_REGISTERS = {".pred": "bool", ".b32": "unsigned"}


class Parameter(NamedTuple):
    """One of a kernel's; type without const, such as "float*"."""

    name: str
    type: str


class Translation(NamedTuple):
    text: str
    kernels: dict[str, list[Parameter]]


def translate(source: str) -> Translation:
    """A preprocessed source as C++ that follows the header; `run_NAME` calls kernel NAME."""
    text = "".join(_without_asm(source))
    text, count = _DYNAMIC.subn("#define shared (on_cpu::dynamic_shared())\n", text)
    assert count == 1
    text = _STATIC.sub(r"\1& \2 = on_cpu::static_shared<\1, __COUNTER__>();", text)
    kernels = {name: _parameters(given) for name, given in _KERNEL.findall(text)}
    assert len(kernels) == text.count("__global__")
    wrappers = (_wrapper(name, parameters) for name, parameters in kernels.items())
    return Translation("\n".join((text, *wrappers)), kernels)


def translate_asm(template: str, operands: list[str], number: int) -> str:
    """PTX as C++ statements; labels end in `number`."""
    template = template.strip()
    if template.startswith("{"):
        assert template.endswith("}")
        template = template[1:-1]
    statements = (_instruction(each.strip(), operands, number) for each in template.split(";"))
    return "{ " + " ".join(statements) + " }"


def _instruction(text: str, operands: list[str], number: int) -> str:
    if label := re.match(r"(\w+):(?!:)\s*", text):
        return f"{label[1]}_{number}:; " + _instruction(text[label.end() :], operands, number)
    if not text:
        return ""
    if guard := re.match(r"@(\w+)\s+", text):
        return f"if ({guard[1]}) " + _instruction(text[guard.end() :], operands, number)
    opcode, _, rest = text.partition(" ")
    if opcode == ".reg":
        kind, name = rest.split()
        return f"{_REGISTERS[kind]} {name}{{}};"
    if opcode == "bra":
        return f"goto {rest}_{number};"
    given = [_operand(each.strip(), operands) for each in _split(rest, ",")]
    name = re.sub(r"[.:]+", "_", opcode)
    return f"ptx::{name}({', '.join(each for each in given if each)});"


def _operand(text: str, operands: list[str]) -> str:
    if text == "_":  # nobody wants it
        return ""
    if text.startswith("{"):
        own = ", ".join(_operand(each.strip(), operands) for each in text[1:-1].split(","))
        return f"ptx::registers({own})"
    if text.startswith("["):
        text = text[1:-1]
    return re.sub(r"%(\d+)", lambda found: f"({operands[int(found[1])]})", text)


def _without_asm(source: str) -> Iterator[str]:
    position = 0
    for number, found in enumerate(_ASM.finditer(source)):
        stop = _closing(source, found.end())
        statement = re.sub(r"(?m)^#.*$", "", source[found.end() : stop])
        template, *sections = _split(statement, ":")
        operands = [
            _split(each, "(", 1)[1].strip()[:-1]
            for section in sections[:2]
            for each in _split(section, ",")
            if each.strip()
        ]
        yield source[position : found.start()]
        words = "".join(_STRING.findall(template))
        yield translate_asm(words, operands, number)
        position = stop + 1
    yield source[position:]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that is open at `start`."""
    depth = 1
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    raise AssertionError("a parenthesis does not close")


def _split(text: str, separator: str, most: int = -1) -> list[str]:
    """Split where neither a string nor a bracket is open."""
    parts: list[str] = []
    depth = begin = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[()\[\]{},:]', text):
        if found[0] == separator and depth == 0 and len(parts) != most:
            parts.append(text[begin : found.start()])
            begin = found.end()
        depth += (found[0] in "([{") - (found[0] in ")]}")
    return [*parts, text[begin:]]


def _parameters(given: str) -> list[Parameter]:
    parameters = []
    for each in given.split(","):
        found = re.fullmatch(
            r"\s*(?:const\s+)?(?:__grid_constant__\s+)?([\w\s]+?\s*\*?)\s*(\w+)\s*", each
        )
        assert found, each
        parameters.append(Parameter(found[2], found[1].strip().replace(" *", "*")))
    return parameters


def _wrapper(name: str, parameters: list[Parameter]) -> str:
    given = ", ".join(f"*static_cast<{each.type}*>(a[{i}])" for i, each in enumerate(parameters))
    return f'extern "C" void run_{name}(void** a) {{ {name}({given}); }}'
