"""`qlorachat cache`: every kind we keep is listed and cleared, and nothing else."""

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from qlorachat.checkpoints.cache import build_once
from qlorachat.cli.cache import MEANING
from qlorachat.cli.main import main
from qlorachat.kernels import cuda_source, tuned
from qlorachat.user_cache import Kind

Capture = pytest.CaptureFixture[str]
KINDS: tuple[Kind, ...] = ("models", "kernels", "tuned")
CARD = torch.device("cuda", 7)  # its name is all that is asked of it


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in [name for name in os.environ if name.startswith("QLORACHAT_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("QLORACHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache with a model of 2 files and 150 kB, a compiled kernel, a card's measurements."""
    if not cuda_source.found():
        pytest.skip("needs NVRTC, which compiles without a card")
    build_once("entry", write_one)
    cuda_source.machine_code("nf4_write_out.cu", "sm_89", ["SHARED_BASE=0"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test Card")
    tuned.keep({(8, (16, 64)): 28}, CARD)
    return root


def write_one(folder: Path) -> None:
    (folder / "one").write_bytes(bytes(150_000))


def files(folder: Path) -> list[Path]:
    """All but the locks, which stay."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_every_folder_that_we_write_is_a_kind(filled: Path) -> None:
    assert {path.name for path in filled.iterdir()} == set(KINDS)


def test_each_kind_is_listed_with_its_files_and_size(filled: Path, capsys: Capture) -> None:
    assert main(["cache"]) == 0
    captured = capsys.readouterr()
    models, kernels, measured = captured.out.splitlines()
    assert models.split(maxsplit=5) == ["models", "2", "files", "0.2", "MB", MEANING["models"]]
    for kind, line in zip(KINDS[1:], (kernels, measured), strict=True):
        kilobytes = f"{size(filled / kind) / 1e3:.1f}"
        assert line.split(maxsplit=5) == [kind, "1", "file", kilobytes, "kB", MEANING[kind]]
    assert captured.err == f"{size(filled) / 1e6:.1f} MB in {filled}\n"


def test_one_kind_is_listed_by_its_entries(filled: Path, capsys: Capture) -> None:
    assert main(["cache", "list", "models"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split() == ["2", "files", "0.2", "MB", str(filled / "models" / "entry")]
    assert main(["cache", "list", "tuned"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "Test-Card" in line


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_is_cleared_alone(kind: str, filled: Path, capsys: Capture) -> None:
    assert main(["cache", "clear", kind]) == 0
    assert f"cleared {kind}: " in capsys.readouterr().err
    assert [other for other in KINDS if files(filled / other)] == [k for k in KINDS if k != kind]


def test_all_is_cleared_with_what_killed_writers_left(filled: Path, capsys: Capture) -> None:
    for left in ("models/other.tmp-1/one", "kernels/a.cubin.tmp-1", "tuned/a.json.tmp-1"):
        (filled / left).parent.mkdir(exist_ok=True)
        (filled / left).write_bytes(b"")
    assert main(["cache", "clear"]) == 0
    err = capsys.readouterr().err
    assert [line.split(",")[0] for line in err.splitlines()] == [
        "cleared tuned: 2 files",
        "cleared kernels: 2 files",
        "cleared models: 3 files",
    ]
    assert files(filled) == []


def test_clearing_touches_no_strangers(filled: Path) -> None:
    mine = [filled / "notes.txt", *(filled / kind / "notes.txt" for kind in KINDS)]
    mine += [filled / "kernels" / "deep" / "a.cubin", filled / "tuned" / "adapter" / "config.json"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert main(["cache", "clear"]) == 0
    assert sorted(files(filled)) == sorted(mine)


@pytest.mark.parametrize("arguments", [[], ["list", "tuned"], ["clear"], ["clear", "kernels"]])
def test_a_missing_folder_is_one_line(arguments: list[str], root: Path, capsys: Capture) -> None:
    assert main(["cache", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(f"nothing is kept in {root}\n")
    assert captured.err.count("\n") == 1
    assert not root.exists()


def test_a_model_in_use_stays_and_the_rest_is_cleared(filled: Path, capsys: Capture) -> None:
    with FileLock(filled / "models" / "entry.lock"):
        assert main(["cache", "clear"]) == 1
    *cleared, error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in cleared] == ["cleared tuned", "cleared kernels"]
    assert "is in use" in error
    assert [kind for kind in KINDS if files(filled / kind)] == ["models"]


@pytest.mark.parametrize(("action", "said"), [("list", "can't be read"), ("clear", "cleared")])
@pytest.mark.parametrize("blocked", ["", "models", "kernels", "tuned"])
def test_a_folder_that_is_none_is_one_line(
    action: str, said: str, blocked: str, root: Path, capsys: Capture
) -> None:
    (root / blocked).parent.mkdir(exist_ok=True)
    (root / blocked).write_text("a file")
    assert main(["cache", action]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert str(root / blocked) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_removed_is_one_line(
    kind: str, filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(path: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # root may do anything, so a folder's own permissions would not do
    monkeypatch.setattr("shutil.rmtree", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["cache", "clear", kind]) == 1
    err = capsys.readouterr().err
    assert "cleared ([Errno 13] Permission denied" in err
    assert err.count("\n") == 1
    assert files(filled / kind)


def test_a_home_folder_that_is_none_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("QLORACHAT_CACHE", "~no-such-user/cache")
    assert main(["cache"]) == 2
    err = capsys.readouterr().err
    assert "QLORACHAT_CACHE is ~no-such-user/cache" in err
    assert err.count("\n") == 1
