"""Saved chats: named safely, written whole, read by their owner only, read back as they were."""

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorachat import Message
from qlorachat.errors import UsageError
from qlorachat_cli.conversation import Conversation
from qlorachat_cli.plugin import CliOptions
from qlorachat_cli.storage import Chats, Storage, checked_name

CHAT = Conversation(
    messages=(Message("user", "クマ\n🐻"), Message("assistant", "")),
    system="Be brief.",
    adapter="zundamon",
    settings={"temperature": 0.2, "logit_bias": {5: -1.0}},
)
HOSTILE = [
    *("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "..\\x", "~", "~root", "C:x", "C:\\x"),
    *("a\0b", "a\nb", "a b", " a", "a ", ".hidden", "-rf", "x" * 61, "x" * 4096, "．．／x", "a／b"),
    *(
        "CON",
        "nul",
        "Aux.json",
        "COM1",
        "lpt9.txt",
        "com¹",
        "%2e%2e%2f",
        "file:x",
        "a*",
        "?",
        "a|b",
    ),
]
names = st.text(max_size=70) | st.from_regex(r"\w[\w.-]{0,59}", fullmatch=True)


@pytest.fixture
def chats(tmp_path: Path) -> Chats:
    storage = Storage.of(CliOptions(folder=tmp_path / "chat"))
    storage.prepare()
    return storage.chats


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_and_touch_nothing(chats: Chats, name: str) -> None:
    with pytest.raises(UsageError) as saving:
        chats.save(name, CHAT)
    with pytest.raises(UsageError) as loading:
        chats.load(name)
    assert str(saving.value) == str(loading.value)
    assert str(saving.value).isprintable()
    assert list(chats.folder.iterdir()) == []


@given(names)
def test_an_accepted_name_is_one_part_of_a_path_everywhere(name: str) -> None:
    try:
        accepted = checked_name(name)
    except UsageError:
        return
    for path in (
        PurePosixPath("chats", f"{accepted}.json"),
        PureWindowsPath("c", f"{accepted}.json"),
    ):
        assert len(path.parts) == 2
        assert path.name == f"{accepted}.json"
        assert len(path.name.encode()) <= 255
    assert checked_name(accepted) == accepted


def test_a_chat_comes_back_as_it_was(chats: Chats) -> None:
    saved = chats.save("クマ", CHAT)
    assert saved.name == "クマ"
    assert chats.names() == ["クマ"]
    assert chats.load("クマ") == saved
    assert chats.load("ク\u30de") == saved


def test_one_name_in_two_unicode_forms_is_one_chat(chats: Chats) -> None:
    chats.save("が", CHAT)
    assert chats.load("か\u3099").name == "が"


def test_another_chat_is_not_overwritten_but_the_same_is(chats: Chats) -> None:
    saved = chats.save("a", CHAT)
    with pytest.raises(UsageError, match="another chat named `a`"):
        chats.save("a", Conversation())
    assert chats.load("a") == saved
    longer = saved.asked("more")
    chats.save("a", longer)
    assert chats.load("a") == longer


@pytest.mark.skipif(os.name != "posix", reason="Windows has no permission bits")
def test_everything_is_for_its_owner_only(tmp_path: Path) -> None:
    (tmp_path / "history").touch(mode=0o644)
    storage = Storage.of(CliOptions(folder=tmp_path))
    storage.prepare()
    storage.chats.save("a", CHAT)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {"history": 0o600, "chats": 0o700, "a.json": 0o600}


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_save_leaves_the_old_chat_and_no_rest(
    chats: Chats, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    saved = chats.save("a", CHAT)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(UsageError, match=r"can't be written \(No space left on device\)"):
        chats.save("a", saved.asked("more"))
    monkeypatch.undo()
    assert chats.load("a") == saved
    assert [path.name for path in chats.folder.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_a_link_out_of_the_folder_is_not_followed(chats: Chats, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text('{"messages": []}', encoding="utf-8")
    (chats.folder / "a.json").symlink_to(outside)
    with pytest.raises(UsageError, match="link out of"):
        chats.load("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no chat"),
        (b"{", "holds no chat"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "holds no chat"),
        (b'{"messages": [], "extra": 1}', "Extra inputs"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "role is one of"),
        (b'{"messages": [], "settings": {"temperature": 9}}', "from 0.0 to 2.0"),
        (b'{"messages": [], "settings": {"heat": 1}}', "does not exist"),
    ],
)
def test_a_damaged_file_is_one_clear_line(chats: Chats, content: bytes, message: str) -> None:
    (chats.folder / "a.json").write_bytes(content)
    with pytest.raises(UsageError) as raised:
        chats.load("a")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_chat_names_the_nearest(chats: Chats) -> None:
    chats.save("seals", CHAT)
    with pytest.raises(UsageError, match=r"`seal` does not exist; did you mean `seals`\?"):
        chats.load("seal")
