"""What a CUDA source is compiled to: registers, spills and instructions of kernels and their loops.

    python bench/machine_code.py nf4_matmul_hopper.cu
    python bench/machine_code.py decode_attention.cu \\
        HEAD_DIM=128 GROUP=4 IN_8_BITS=0 STAGES=3 CLUSTERS=1

No card is needed: NVRTC compiles for --architecture, and tools that come with Triton read it. A
loop is what lies between a label and the first branch back to it, others inside included; branches
from behind the kernel's end, where rare cases are put, do not count.
"""

import argparse
import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qlorachat.kernels import cuda_source

KERNELS = Path(cuda_source.__file__).parent
LEAST = 30  # instructions of a loop that is shown
SPILLS = {"STL", "LDL"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", choices=sorted(path.name for path in KERNELS.glob("*.cu")))
    parser.add_argument("definitions", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--architecture", default="sm_90a")
    parser.add_argument("--kernel", default="", help="only those with this in their name")
    arguments = parser.parse_args()
    definitions = ["SHARED_BASE=1024", *arguments.definitions]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        code = cuda_source.compile_source(arguments.source, arguments.architecture, definitions)
        file.write(code)
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        listing = run("nvdisasm", "--print-code", file.name)
    registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", usage))
    for name, lines in kernels(listing):
        if arguments.kernel in name:
            instructions = [line for line in lines if not line.endswith(":")]
            print(f"{name}: {registers[name]} registers, {described(instructions)}")
            for loop in loops(lines):
                print(f"  a loop: {described(loop)}")


def run(tool: str, *arguments: str) -> str:
    triton = importlib.util.find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def kernels(listing: str) -> Iterator[tuple[str, list[str]]]:
    """Names, and lines: labels with a colon, and instructions without their predicates."""
    for section in re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition(":")
        found = re.findall(r"^(\.L_x_\d+:)|\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", body, re.MULTILINE)
        yield name, [label or instruction for label, instruction in found]


def loops(lines: list[str]) -> list[list[str]]:
    """The shortest to each label."""
    places = {line[:-1]: place for place, line in enumerate(lines) if line.endswith(":")}
    shortest: dict[int, list[str]] = {}
    for place, line in enumerate(lines):
        target = re.search(r"BRA.*?(\.L_x_\d+)", line)
        start = places.get(target[1], place) if target else place
        loop = [each for each in lines[start : place + 1] if not each.endswith(":")]
        if len(loop) >= LEAST and not any(each.startswith("EXIT") for each in loop):
            shortest.setdefault(start, loop)
    return list(shortest.values())


def described(instructions: list[str]) -> str:
    counts = Counter(re.split(r"[ .]", each)[0] for each in instructions)
    spills = sum(counts[opcode] for opcode in SPILLS)
    most = ", ".join(f"{count} {opcode}" for opcode, count in counts.most_common(8))
    return f"{len(instructions)} instructions, {spills} for spills ({most})"


if __name__ == "__main__":
    main()
