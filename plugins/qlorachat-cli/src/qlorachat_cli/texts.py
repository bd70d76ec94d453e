"""Every fixed text of the chat in English and in Japanese; both have the same keys."""

import locale
import os
from collections.abc import Mapping

Texts = Mapping[str, str]

_LOCALE_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")  # in the order in which POSIX ranks them

ENGLISH: Texts = {
    "greeting": "qlorachat · {model} · {device}{quantization}",
    "adapters": "adapters: {names}",
    "hint": "/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.",
    "/help": "show this list",
    "/system": "set the system prompt; alone: the default one again",
    "/adapter": "answer with this adapter; alone: with the base model",
    "/set": "change a setting (top_p=0.5, top_p={default}); alone: list",
    "/retry": "answer the last message again",
    "/undo": "remove the last message and its answer",
    "/edit": "edit the last message and send it again",
    "/multi": "switch between one-line and multi-line entry",
    "/save": "save this chat",
    "/load": "go on with a saved chat",
    "/stats": "show the model, the context in use and the speed",
    "/exit": "leave",
    "help.slash": "A message that begins with / is written with //.",
    "help.newline": "Alt-Enter starts a new line; with /multi Enter does, and Alt-Enter sends.",
    "help.interrupt": "Ctrl-C stops an answer and keeps its text; at the empty prompt it leaves.",
    "system.set": "The system prompt is set.",
    "system.default": "The system prompt is the default one again.",
    "adapter.set": "Answers now come with the adapter {name}.",
    "adapter.base": "Answers now come from the base model.",
    "changed": "changed",
    "undone": "Removed: {question}",
    "editing": "Edit and press Enter to send it again; Ctrl-C leaves the chat as it is.",
    "multi.on": "Multi-line entry: Enter starts a new line, Alt-Enter sends.",
    "multi.off": "One-line entry: Enter sends, Alt-Enter starts a new line.",
    "saved": "Saved as {name}.",
    "loaded": "Loaded {name}: {count} messages. The last question was: {question}",
    "loaded.adapter": "Its adapter {name} is not loaded here: answers come from {current}.",
    "base": "the base model",
    "speed": "{tokens} tokens · {seconds:.1f} s · {rate:.1f} tokens/s · {reason}",
    "stop": "stop",
    "length": "length",
    "aborted": "aborted",
    "cut": "The answer was cut at max_tokens={tokens}: /set max_tokens={more} and /retry for more.",
    "full": "The context of {context} tokens is full: the answer was cut there.",
    "dropped": "{count} of the oldest messages were left out to fit the context.",
    "stopped": "Stopped before the first word; the chat is as it was.",
    "stats.model": "model: {model} · {device}{quantization} · {memory}",
    "stats.adapter": "adapter: {name}",
    "stats.context": "context: {used} of {context} tokens at the last answer",
    "stats.answers": "answers: {answers} · {tokens} tokens · {rate:.1f} tokens/s",
    "stats.last": "last answer: {tokens} tokens · first after {first:.2f} s · {rate:.1f} tokens/s",
}

JAPANESE: Texts = {
    "greeting": "qlorachat · {model} · {device}{quantization}",
    "adapters": "アダプター: {names}",
    "hint": "/help でコマンド一覧、Ctrl-C で回答を中断、Ctrl-D で終了します。",
    "/help": "この一覧を表示",
    "/system": "システムプロンプトを設定（文なしで既定に戻す）",
    "/adapter": "使うアダプターを選ぶ（名前なしでベースモデル）",
    "/set": "設定を変更（top_p=0.5、top_p={default}）。単独で一覧",
    "/retry": "最後のメッセージにもう一度回答させる",
    "/undo": "最後のメッセージと回答を取り消す",
    "/edit": "最後のメッセージを編集して送り直す",
    "/multi": "一行入力と複数行入力を切り替える",
    "/save": "この会話を保存",
    "/load": "保存した会話を続ける",
    "/stats": "モデル、コンテキスト使用量、速度を表示",
    "/exit": "終了",
    "help.slash": "/ で始まるメッセージは // と書いてください。",
    "help.newline": "Alt-Enter で改行。/multi では Enter で改行、Alt-Enter で送信。",
    "help.interrupt": "Ctrl-C は回答を中断し、そこまでの文を残します。空の入力行では終了します。",
    "system.set": "システムプロンプトを設定しました。",
    "system.default": "システムプロンプトを既定に戻しました。",
    "adapter.set": "アダプター {name} で回答します。",
    "adapter.base": "ベースモデルで回答します。",
    "changed": "変更済み",
    "undone": "取り消しました: {question}",
    "editing": "編集して Enter で送り直します。Ctrl-C で会話はそのまま残ります。",
    "multi.on": "複数行入力: Enter で改行、Alt-Enter で送信。",
    "multi.off": "一行入力: Enter で送信、Alt-Enter で改行。",
    "saved": "{name} に保存しました。",
    "loaded": "{name} を読み込みました（{count} 件）。最後の質問: {question}",
    "loaded.adapter": "アダプター {name} は読み込まれていません。{current}で回答します。",
    "base": "ベースモデル",
    "speed": "{tokens} トークン · {seconds:.1f} 秒 · {rate:.1f} トークン/秒 · {reason}",
    "stop": "完了",
    "length": "長さの上限",
    "aborted": "中断",
    "cut": "max_tokens={tokens} で打ち切りました。/set max_tokens={more} の後 /retry をどうぞ。",
    "full": "コンテキスト（{context} トークン）が一杯になり、回答を打ち切りました。",
    "dropped": "コンテキストに収めるため、古いメッセージ {count} 件を省きました。",
    "stopped": "最初の文字の前に中断しました。会話は元のままです。",
    "stats.model": "モデル: {model} · {device}{quantization} · {memory}",
    "stats.adapter": "アダプター: {name}",
    "stats.context": "コンテキスト: 前回の回答で {used} / {context} トークン",
    "stats.answers": "回答: {answers} 件 · {tokens} トークン · {rate:.1f} トークン/秒",
    "stats.last": "前回の回答: {tokens} トークン · 最初まで {first:.2f} 秒 · "
    "{rate:.1f} トークン/秒",
}


def choose_texts(environment: Mapping[str, str] = os.environ) -> Texts:
    """Japanese texts where the locale is Japanese, else English ones."""
    return JAPANESE if _locale_name(environment).lower().startswith("ja") else ENGLISH


def _locale_name(environment: Mapping[str, str]) -> str:
    """`ja_JP.UTF-8` from the variables, else what the system says (Windows: `Japanese_Japan`)."""
    for variable in _LOCALE_VARIABLES:
        if value := environment.get(variable):
            return value
    return locale.getlocale()[0] or ""
