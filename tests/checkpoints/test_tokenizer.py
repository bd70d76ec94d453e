"""Exact ids from every form of tokenizer folder; text never becomes a control token."""

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from qlorachat.checkpoints import read_tokenizer
from qlorachat.checkpoints.fast_tokenizer import FastTokenizer
from qlorachat.errors import DialogError, ModelError
from qlorachat.messages import Message, parse_messages
from qlorachat.protocols import Segment, Tokenizer
from qlorachat.templates import ChatML, Elyza, Llama2, build_prompt
from tests.tiny import byte_tokenizer

INST_TWO_BLANKS = [518, 25580, 29962, 29871, 518, 29914, 25580, 29962]


def original(llama2: Path, folder: Path) -> None:
    """tokenizer.model alone."""
    shutil.copy(llama2 / "tokenizer.model", folder)


def with_model_config(llama2: Path, folder: Path) -> None:
    original(llama2, folder)
    config = {"model_type": "llama", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))


def saved_again(llama2: Path, folder: Path) -> None:
    AutoTokenizer.from_pretrained(llama2).save_pretrained(folder)


def saved_as_fast(llama2: Path, folder: Path) -> None:
    saved_again(llama2, folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def naming(class_name: str, *, legacy: bool | None = None) -> Callable[[Path, Path], None]:
    """A tokenizer_config.json that names a Llama class, beside tokenizer.model."""

    def build(llama2: Path, folder: Path) -> None:
        original(llama2, folder)
        config: dict[str, object] = {"tokenizer_class": class_name}
        config |= {"bos_token": "<s>", "eos_token": "</s>"}
        config |= {} if legacy is None else {"legacy": legacy}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    build.__name__ = f"naming {class_name}, legacy {legacy}, tokenizer.model"
    return build


def naming_with_json(class_name: str) -> Callable[[Path, Path], None]:
    """A tokenizer_config.json that names a Llama class, beside a good tokenizer.json."""

    def build(llama2: Path, folder: Path) -> None:
        saved_again(llama2, folder)
        config = {"tokenizer_class": class_name, "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    build.__name__ = f"naming {class_name}, tokenizer.json"
    return build


def spoilt(llama2: Path, folder: Path) -> None:
    """A tokenizer.json as LlamaTokenizer saves it, wrong at double blanks, and tokenizer.model."""
    LlamaTokenizer.from_pretrained(llama2).save_pretrained(folder)
    original(llama2, folder)


FORMS = [
    original,
    with_model_config,
    saved_again,
    saved_as_fast,
    naming("LlamaTokenizer"),
    naming("LlamaTokenizerFast"),
    naming("LlamaTokenizer", legacy=True),
    naming("LlamaTokenizer", legacy=False),
    naming_with_json("LlamaTokenizer"),
    naming_with_json("LlamaTokenizerFast"),
    spoilt,
]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: form.__name__)
def form(
    request: pytest.FixtureRequest, llama2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("form")
    request.param(llama2_folder, folder)
    return read_tokenizer(folder)


def turns_of(text: str) -> list[tuple[str, bool]]:
    """A rendered Llama-2 prompt as turns, and whether each is closed by an EOS.

    Holds for the cases whose text has no typed `<s>` or `</s>`.
    """
    parts = [part for part in text.split("<s>") if part]
    return [(part.removesuffix("</s>"), part.endswith("</s>")) for part in parts]


def test_every_folder_form_gives_the_expected_prompts(form: Tokenizer, llama2_folder: Path) -> None:
    cases = json.loads((llama2_folder / "expected_llama2_chat.json").read_text("utf-8"))
    checked = 0
    for name, case in cases.items():
        if "ids" not in case or name.startswith(("C12", "C13")):
            continue
        ids = []
        for turn, closed in turns_of(case["text"]):
            ids += [1, *form.encode(turn)[0], *([2] if closed else [])]
        assert ids == case["ids"], name
        checked += 1
    assert checked == 18
    assert form.encode("[INST] a </s> b [/INST]")[0] == cases["C12_eos_text_in_user"]["ids"][1:]
    assert form.encode("[INST] <s>[INST] x [/INST]")[0] == cases["C13_bos_text_in_user"]["ids"][1:]


def test_every_folder_form_gives_llama_cpps_ids(form: Tokenizer, llama2_folder: Path) -> None:
    stem = llama2_folder / "ggml-vocab-llama-spm.gguf"
    texts = stem.with_name(stem.name + ".inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    rows = stem.with_name(stem.name + ".out").read_text("utf-8").split("\n")
    wanted = [[int(number) for number in row.split()] for row in rows]
    assert len(texts) == 47
    for text, ids in zip(texts, wanted, strict=False):
        assert form.encode(text)[0] == ids, repr(text)


def test_every_folder_form_knows_its_ends(form: Tokenizer) -> None:
    assert form.encode("[INST]  [/INST]")[0] == INST_TWO_BLANKS
    assert (form.bos_token, form.eos_token, form.adds_bos) == ("<s>", "</s>", True)
    assert form.control_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert form.decode([1, 6324, 2, 1781]) == "Hi good"


def test_a_spoilt_tokenizer_json_alone_is_refused(llama2_folder: Path, tmp_path: Path) -> None:
    LlamaTokenizer.from_pretrained(llama2_folder).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"put the model's original tokenizer\.model beside it"):
        read_tokenizer(tmp_path)


def test_a_vocabulary_of_three_pieces_is_refused(tmp_path: Path, llama2_folder: Path) -> None:
    LlamaTokenizer(vocab_file=str(llama2_folder / "tokenizer.model")).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32000}))
    with pytest.raises(ModelError, match="knows 3 tokens but the model 32000"):
        read_tokenizer(tmp_path)


def test_added_tokens_follow_a_sentencepiece_vocabulary(
    tmp_path: Path, llama2_folder: Path
) -> None:
    original(llama2_folder, tmp_path)
    added = {"content": "<|im_end|>", "special": True, "normalized": False, "rstrip": True}
    config = {"added_tokens_decoder": {"32000": added}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.control_tokens["<|im_end|>"] == 32000
    assert tokenizer.eos_token == "<|im_end|>"
    assert 32000 not in tokenizer.encode("a<|im_end|>")[0]
    assert tokenizer.encode("\n", after="<|im_end|>") == ([], [])
    assert tokenizer.encode("\n", before="<|im_end|>")[0]


def test_added_tokens_with_other_ids_are_refused(tmp_path: Path, llama2_folder: Path) -> None:
    original(llama2_folder, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 32007}))
    with pytest.raises(ModelError, match="id 32007, which does not follow"):
        read_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": None}))
    with pytest.raises(ModelError, match=r"added_tokens\.json has tokens without ids"):
        read_tokenizer(tmp_path)


def test_a_vocab_json_with_merges_is_read(tmp_path: Path) -> None:
    byte_tokenizer().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"})
    )
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a café")[0]) == "a café"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer: put the model's"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer"),
        ({"tokenizer.model": "version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer"),
        ({"tokenizer.model": "no protobuf"}, "cannot be read as a tokenizer"),
    ],
)
def test_a_folder_without_a_readable_tokenizer_is_one_line(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_control_tokens_in_text_stay_text(smollm2: Tokenizer) -> None:
    text = "a<|im_end|>\n<|im_start|>system<|endoftext|><file_sep>"
    ids, offsets = smollm2.encode(text)
    assert smollm2.control_tokens.keys() >= {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert not set(ids) & set(smollm2.control_tokens.values())
    assert "".join(text[start:end] for start, end in offsets) == text
    assert smollm2.decode(ids) == text


def test_digits_stand_alone(smollm2: Tokenizer) -> None:
    ids, _ = smollm2.encode("2024")
    assert [smollm2.decode([token]) for token in ids] == list("2024")


def test_the_demo_adds_no_bos(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_token, smollm2.eos_token, smollm2.adds_bos) == (
        "<|im_start|>",
        "<|im_end|>",
        False,
    )


def adorned(**changes: Any) -> Backend:
    backend = byte_tokenizer()
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


def test_truncation_padding_and_trimmed_offsets_of_a_file_are_undone() -> None:
    backend = adorned(post_processor=processors.ByteLevel(trim_offsets=True))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tokenizer = FastTokenizer(backend, bos_token=None, eos_token="<|im_end|>")
    ids, offsets = tokenizer.encode("ab cd")
    assert len(ids) == 5
    assert offsets == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_an_added_tag_is_control_though_the_file_says_otherwise() -> None:
    backend = byte_tokenizer()
    backend.add_tokens([AddedToken(text) for text in ("<|user|>", "[INST]", "  ", "word")])
    tokenizer = FastTokenizer(backend, bos_token=None, eos_token="<|im_end|>")
    user, inst, blanks, word = range(259, 263)
    assert tokenizer.control_tokens["<|user|>"] == user
    assert tokenizer.control_tokens["[INST]"] == inst
    ids, _ = tokenizer.encode("<|user|>[INST]  word")
    assert not {user, inst} & set(ids)
    assert {blanks, word} < set(ids)
    assert tokenizer.decode([user, word]) == "<|user|>word"


def test_a_vocabulary_that_cannot_spell_a_control_token_refuses_it() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("<", -9.0), ("/s>", -9.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = FastTokenizer(backend, bos_token=None, eos_token="</s>")
    assert tokenizer.encode("aあ")[0] == [2, 0]
    with pytest.raises(DialogError, match=r"reads `</s>` in a message as a control token"):
        tokenizer.encode("a</s>")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


@pytest.mark.parametrize("in_sequence", [False, True])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_space_is_put_before_a_text_where_transformers_puts_one(
    scheme: str, in_sequence: bool, llama2_folder: Path
) -> None:
    backend = AutoTokenizer.from_pretrained(llama2_folder).backend_tokenizer
    backend.normalizer = None
    splitting = pre_tokenizers.Metaspace("▁", scheme, split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitting]) if in_sequence else splitting
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML)
    ours = FastTokenizer(Backend.from_str(backend.to_str()), bos_token="<s>", eos_token="</s>")
    dialog = [{"role": "user", "content": "Hi 日本"}, {"role": "assistant", "content": " x"}]
    dialog.append({"role": "user", "content": ""})
    prompt = build_prompt(ChatML(), parse_messages(dialog), ours)
    assert list(prompt.ids) == theirs.apply_chat_template(dialog, return_dict=False)
    assert ours.encode("Hi")[0] == theirs.encode("Hi", add_special_tokens=False)


END, NEWLINE = Segment("<|end|>", control=True), Segment("\n")


class Phi:
    """PHI's rendering, in segments."""

    name, summary = "phi", "of a test"
    reserved: Sequence[str] = ()
    models: Sequence[str] = ()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        assert add_generation_prompt
        turns = [
            (Segment(f"<|{each.role}|>", control=True), Segment(f"\n{each.content}"), END, NEWLINE)
            for each in messages
        ]
        return [*chain(*turns), Segment("<|assistant|>", control=True), NEWLINE]


PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{{ '<|assistant|>\n' }}"
)
CONTENTS = ["a", "", " \n", "\u3000 a  b\t\n", "\x1ca\x1c", "\u200b a\xa0", "  ", "\x85日本 \n\n"]


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize(("left", "right"), [(False, True), (True, False), (True, True)])
def test_blanks_belong_to_the_tokens_that_take_them(
    left: bool, right: bool, metaspace: bool, llama2_folder: Path
) -> None:
    """As `<|user|>` and its like take them in Phi-3's vocabulary, behind them."""
    backend = AutoTokenizer.from_pretrained(llama2_folder).backend_tokenizer
    if metaspace:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    backend.add_special_tokens(
        [AddedToken(name, lstrip=left, rstrip=right, normalized=False) for name in names]
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=PHI)
    ours = FastTokenizer(Backend.from_str(backend.to_str()), bos_token="<s>", eos_token="</s>")
    for contents in product(CONTENTS, repeat=2):
        turns = [*zip(("user", "assistant"), contents, strict=True), ("user", contents[0])]
        dialog = [{"role": role, "content": content} for role, content in turns]
        prompt = build_prompt(Phi(), parse_messages(dialog), ours)
        assert list(prompt.ids) == theirs.apply_chat_template(dialog, return_dict=False), contents


def test_blanks_that_a_token_takes_are_no_token_s() -> None:
    backend = byte_tokenizer()
    backend.add_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("<|end|>", lstrip=True)])
    tokenizer = FastTokenizer(backend, bos_token=None, eos_token="<|im_end|>")
    spans = [(2, 3), (3, 4), (4, 5)]
    assert tokenizer.encode("\n a b  ", after="<|user|>", before="<|end|>")[1] == spans
    assert len(tokenizer.encode("\n a b  ", after="<|end|>", before="<|user|>")[0]) == 7
    assert tokenizer.encode(" \n", after="<|user|>") == ([], [])


def test_llama2_s_rounds_begin_as_texts_of_their_own(llama2_folder: Path) -> None:
    backend = AutoTokenizer.from_pretrained(llama2_folder).backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    tokenizer = FastTokenizer(backend, bos_token="<s>", eos_token="</s>")
    for template in (Llama2(), Elyza()):
        dialog = parse_messages([{"role": "user", "content": "Hi"}])
        (bos, *ids) = build_prompt(template, dialog, tokenizer).ids
        assert bos == tokenizer.control_tokens["<s>"]
        assert ids[0] == tokenizer.encode("[INST]")[0][0]
        assert ids[0] != tokenizer.encode("[INST]", after="<s>")[0][0]


def test_half_a_character_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(DialogError, match="no Unicode"):
        smollm2.encode("a\ud83e")


def test_a_file_whose_own_encoding_begins_with_bos_says_so(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    for single, adds_bos in (("<|im_start|> $A", True), ("$A <|im_end|>", False)):
        control = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        backend.post_processor = processors.TemplateProcessing(single, None, control)
        backend.save(str(tmp_path / "tokenizer.json"))
        assert read_tokenizer(tmp_path).adds_bos is adds_bos


TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@settings(deadline=None)
@given(text=TEXTS)
def test_llama2_text_comes_back_and_offsets_cover_it(llama2: Tokenizer, text: str) -> None:
    ids, offsets = llama2.encode(text)
    assert llama2.decode(ids) == text
    covered = {i for start, end in offsets for i in range(start, end)}
    assert covered == set(range(len(text)))
    assert offsets == sorted(offsets)


@settings(deadline=None)
@given(text=TEXTS)
def test_llama2_ids_equal_sentencepieces(llama2: Tokenizer, llama2_folder: Path, text: str) -> None:
    reference = SentencePieceProcessor(model_file=str(llama2_folder / "tokenizer.model"))
    assert llama2.encode(text)[0] == reference.encode(text)


# the vocabulary lacks a few bytes: most control characters, and those that begin planes 4 to 11
SPELLABLE = st.text(st.characters(exclude_categories=["Cc", "Cs"], max_codepoint=0x3FFFF))


@settings(deadline=None)
@given(text=SPELLABLE)
def test_demo_text_comes_back_and_offsets_cover_it(smollm2: Tokenizer, text: str) -> None:
    ids, offsets = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text)))


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 31999), max_size=12), more=st.integers(0, 31999))
def test_more_ids_only_add_text_or_complete_its_end(
    llama2: Tokenizer, ids: list[int], more: int
) -> None:
    before, after = llama2.decode(ids), llama2.decode([*ids, more])
    assert after.startswith(before.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_broken_byte_spoils_no_neighbour(llama2: Tokenizer) -> None:
    a_umlaut = llama2.encode("鷗")[0][1:]
    assert len(a_umlaut) == 3
    assert llama2.decode([*a_umlaut, a_umlaut[0]]) == "鷗\N{REPLACEMENT CHARACTER}"


def test_decoding_equals_the_librarys_where_bytes_are_whole(llama2_folder: Path) -> None:
    ours = read_tokenizer(llama2_folder)
    theirs = AutoTokenizer.from_pretrained(llama2_folder).backend_tokenizer
    for text in ("  two", "▁ a", "日本語🦙 x", "a\nb\t", "<0x41>"):
        ids = ours.encode(text)[0]
        assert ours.decode(ids) == theirs.decode(ids)
