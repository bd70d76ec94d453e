"""The documents' code runs, their links lead somewhere, they name every hook and option, and what
they say of a card's speed is what was measured.
"""

import json
import re
import subprocess
import sys
from inspect import getmembers, isfunction
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qlorachat import hookspecs
from qlorachat.cli.main import COMMANDS
from qlorachat.config import EngineConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")]
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def blocks(language: str) -> list[tuple[str, str, str]]:
    """Every block of a language: where it stands, the word after the language, its code."""
    return [
        (f"{path.relative_to(ROOT).as_posix()}:{number}", word or "", code)
        for path in DOCUMENTS
        for number, (name, word, code) in enumerate(BLOCK.findall(path.read_text("utf-8")), 1)
        if name == language
    ]


@pytest.mark.model
@pytest.mark.parametrize(
    ("where", "word", "code"), [pytest.param(*block, id=block[0]) for block in blocks("python")]
)
def test_python_runs(where: str, word: str, code: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    compile(code, where, "exec")
    if word == "hub":
        pytest.skip("needs the hub and a card; compiled only")
    command = [sys.executable, "-X", "utf8", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout or "print" not in code


@pytest.mark.model
@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a POSIX shell")
@pytest.mark.parametrize(
    ("where", "code"),
    [pytest.param(where, code, id=where) for where, word, code in blocks("sh") if word == "run"],
)
def test_shell_runs(where: str, code: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(Path.home())}
    done = subprocess.run(
        ["sh", "-ec", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text("utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def results(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_the_readme_s_speeds_were_measured(name: str) -> None:
    lines, record = (ROOT / name).read_text("utf-8").splitlines(), results("decode")
    (said,) = (line for line in lines if "docs/performance.md" in line and "H200" in line)
    theirs = "transformers + PEFT generate"
    for batch in (1, 32):
        ours = record[f"engine, batch {batch}, context 256, one adapter, tokens/s"]
        for speed in (ours, record[f"{theirs}, batch {batch}, tokens/s"]):
            assert re.search(rf"\b{speed:,.0f}\b", said), speed


CARD_RESULTS = {"7B": "decode", "13B": "decode_13b", "7B in 8 bits": "decode_int8"}


@pytest.mark.parametrize("model", CARD_RESULTS)
def test_speeds_on_a_card_were_measured(model: str) -> None:
    text, record = (
        (ROOT / "docs" / "performance.md").read_text("utf-8"),
        results(CARD_RESULTS[model]),
    )
    header = re.search(
        rf"^\| (?:Llama-2-)?{model}, batch \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE
    )
    assert header is not None
    rows = [line.strip("| ").split(" | ") for line in header[1].splitlines()]
    assert len(rows) == 7
    for batch, context, *theirs, base, ours, costs in rows:
        case = f"batch {batch}, context {context.replace(',', '')}"
        for shown, who in ((base, "base"), (ours, "one adapter")):
            assert shown.strip("*") == f"{record[f'engine, {case}, {who}, tokens/s']:,.0f}"
        one, none = (record[f"engine, {case}, {who}, tokens/s"] for who in ("one adapter", "base"))
        assert costs.replace("−", "-") == f"{100 * (1 - one / none):.1f} %"
        peer = record.get(f"transformers + PEFT generate, batch {batch}, tokens/s")
        if theirs and context == "256":
            assert theirs == ["–" if peer is None else f"{peer:.0f}"]


def test_room_for_tokens_on_a_card_was_planned() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    narrow, wide = (results(file)["plan"].split(" for ")[1] for file in ("decode_int8", "decode"))
    assert f"room for {narrow} of the 7B model instead of {wide.removesuffix(' tokens')}" in text
    copied = results("decode")["copy GB/s"]
    assert f"Device copy: {copied:,} GB/s" in text


def test_adapters_and_prompts_on_a_card_were_measured() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    cases = (
        (32, 256, "eight adapters", "one adapter", "one"),
        (1, 1024, "one adapter of rank 64", "base", "the base"),
        (32, 256, "one adapter of rank 64", "base", "the base"),
    )
    for batch, context, who, other, said in cases:
        cells: list[str] = []
        for file in CARD_RESULTS.values():
            case, record = f"engine, batch {batch}, context {context}", results(file)
            own, more = (record[f"{case}, {each}, tokens/s"] for each in (who, other))
            below = "" if cells else f" below {said}"
            cells.append(f"{own:,.0f} ({100 * (1 - own / more):.1f} %{below})")
        assert f" | {' | '.join(cells)} |\n" in text
    record = results("decode")
    for batch, (said, rested) in product(
        (1, 4), {"in close succession": "", "the card rested": ", rested"}.items()
    ):
        prompts = f"prefill {batch}x2048"
        theirs, base, ours = (
            record[f"{each}{rested}, tokens/s"]
            for each in (
                f"transformers + PEFT {prompts}",
                f"engine, {prompts}, base",
                f"engine, {prompts}, one adapter",
            )
        )
        assert f"| {batch}, {said} | {theirs:,} | {base:,} | **{ours:,}** |\n" in text
    record = results("decode_13b")
    for who in ("engine, prefill {}x2048, one adapter", "transformers + PEFT prefill {}x2048"):
        one, four = (record[f"{who.format(batch)}, tokens/s"] for batch in (1, 4))
        assert re.search(rf"\b{one:,} (?:of one prompt )?and {four:,}\b", text)


@pytest.mark.parametrize(
    ("name", "said"), [("perplexity_cuda", "H200, fused steps"), ("perplexity", "CPU, one thread")]
)
def test_perplexities_were_measured(name: str, said: str) -> None:
    text, record = (ROOT / "docs" / "performance.md").read_text("utf-8"), results(name)
    theirs = record["transformers is off by, %"]
    ours, narrow = (
        next(iter(results(each)["PagedLlama is off by, %"].values()))
        for each in (name, f"{name}_int8")
    )
    begins = f"| {said} | {record['perplexity']:.3f} | {theirs:.3f} % | **{ours:.3f} %**"
    (row,) = (line for line in text.splitlines() if line.startswith(begins.replace("-", "−")))
    assert row.endswith(f" | {narrow:.3f} % |")


def test_speeds_on_a_cpu_were_measured() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    said = {"nf4": "NF4", "auto": "demo recipe (16 of 30 layers in NF4)", "16bit": "16 bit"}
    for row in results("decode_cpu")["rows"]:
        theirs, ours, alone, eight = (row[key] for key in row if key.endswith(", tokens/s"))
        eight = f"{eight:.0f}" if eight >= 100 else f"{eight}"
        name = said[row["quantization"].split(":")[0]]
        assert f"| {name} | {theirs} | {ours} | **{alone}** | **{eight}** |\n" in text


def test_times_of_products_were_measured() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    columns = ("bitsandbytes", "mma", "mma with B", "wgmma", "wgmma with B")
    shown = [line for line in results("kernels")["lines"] if line["shape"][:2] in ("7B", "13")]
    shown = [line for line in shown if line["rows"] not in (2, 4)]
    assert len(shown) == 35
    for line in shown:
        times = " | ".join(f"{line[f'{column}, us']:.1f}" for column in columns)
        share = f"{line['wgmma, % of copy']:.0f} %"
        assert f"| {line['shape']} | {line['rows']} | {times} | {share} |\n" in text


def test_every_hook_is_documented() -> None:
    text = (ROOT / "docs" / "writing-plugins.md").read_text("utf-8")
    hooks = {
        name
        for name, function in getmembers(hookspecs, isfunction)
        if function.__module__ == hookspecs.__name__
    }
    assert {name for name in hooks if f"`{name}(" not in text} == set()
    assert len(hooks) == 5


def test_the_quickstart_names_every_engine_option_and_the_readme_every_command() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    for name in EngineConfig.model_fields:
        assert name.replace("_", "-") in text or name in text, name
    everything = text + (ROOT / "README.md").read_text("utf-8")
    assert [name for name in COMMANDS if f"qlorachat {name}" not in everything] == []
