"""`qlorachat export`: the table on stdout, one line for a mistake."""

from pathlib import Path

import pytest

from qlorachat.cli.main import main
from tests.lora import write_lora
from tests.tiny import write_folder

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    return write_lora(root / "lora", write_folder(root / "tiny", layers=1))


def test_export_prints_the_check_and_what_to_do_next(
    adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "merged"
    arguments = ["--adapter", str(adapter), "--merged", str(target), "--template", "chatml"]
    assert main(["export", *arguments]) == 0
    out = capsys.readouterr().out
    assert "same likeliest token" in out
    assert "base without adapter" in out
    assert f"qlorachat chat --model {target} --quantization 16bit --template chatml" in out
    assert (target / "model.safetensors").exists()
    assert main(["export", *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", *arguments, "--overwrite", "--no-check"]) == 0
    assert "same likeliest token" not in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["--adapter", "--merged"])
def test_what_must_be_given(missing: str, adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    given = {"--adapter": str(adapter), "--merged": str(tmp_path / "merged")}
    del given[missing]
    assert main(["export", *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert "--adapter A --merged DIR" in error
    assert error.count("\n") == 1


def test_an_adapter_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    none, target = str(tmp_path / "none"), str(tmp_path / "merged")
    assert main(["export", "--adapter", none, "--merged", target]) == 2
    assert capsys.readouterr().err.startswith("qlorachat: There is no adapter folder")
