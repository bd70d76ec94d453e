"""Every word that the page shows, in English and Japanese; both languages have the same keys."""

from qlorachat.errors import (
    ContextOverflow,
    QlorachatError,
    QueueFull,
    UnknownName,
)

TEXTS: dict[str, dict[str, str]] = {
    "en": {
        "chatbot.copy_message": "Copy message",
        "chatbot.copied_message": "Copied message",
        "message": "Message",
        "message_hint": "Ask anything",
        "keys": "Enter sends, Shift+Enter starts a new line.",
        "send": "Send",
        "stop": "Stop",
        "empty": "Ask a question to begin.",
        "adapter": "Adapter",
        "adapter_info": "The LoRA adapter that shapes the answers.",
        "base": "base model (no adapter)",
        "adapter_scale": "Strength",
        "adapter_scale_info": "1 is as trained, 0 the base model.",
        "system": "System prompt",
        "system_hint": "Empty: the model's own",
        "sampling": "Sampling",
        "temperature": "Temperature",
        "temperature_info": "0 always takes the likeliest token; higher is livelier.",
        "top_p": "Top p",
        "top_p_info": "Only the likeliest tokens that make up this share.",
        "top_k": "Top k",
        "top_k_info": "Only this many likeliest tokens; 0 is off.",
        "min_p": "Min p",
        "min_p_info": "Only tokens at least this share as likely as the best; 0 is off.",
        "repetition_penalty": "Repetition penalty",
        "repetition_penalty_info": "Above 1 repeats less.",
        "max_tokens": "Max tokens",
        "max_tokens_info": "The longest answer.",
        "seed": "Seed",
        "seed_info": "The same seed gives the same answer; -1 is random.",
        "drop_oldest": "Forget the oldest turns when the context is full",
        "answering": "Answering …",
        "done": "{tokens} tokens · {seconds:.1f} s · {speed:.1f} tokens/s",
        "cut": "Answer cut at max_tokens ({tokens}): raise Max tokens for longer ones.",
        "full": "Answer cut: the context of {context} tokens is full. Clear the conversation, or "
        "let it forget the oldest turns.",
        "dropped": "The {count} oldest messages no longer fit and were left out.",
        "stopped": "Stopped.",
        "overflow": "The conversation needs {prompt} tokens and the answer {answer}, but the "
        "context holds {context}: shorten the message, lower Max tokens, or clear the "
        "conversation.",
        "busy": "Too many visitors are waiting. Please try again in a moment.",
        "gone": "The adapter “{name}” is no longer loaded. Reload the page to see those that are.",
    },
    "ja": {
        # Gradio has no Japanese for these tooltips of its own
        "chatbot.copy_message": "メッセージをコピー",
        "chatbot.copied_message": "コピーしました",
        "message": "メッセージ",
        "message_hint": "何でも聞いてください",
        "keys": "Enterで送信、Shift+Enterで改行します。",
        "send": "送信",
        "stop": "停止",
        "empty": "質問を入力すると会話が始まります。",
        "adapter": "アダプター",
        "adapter_info": "回答の口調や内容を決めるLoRAアダプターです。",
        "base": "ベースモデル（アダプターなし）",
        "adapter_scale": "強さ",
        "adapter_scale_info": "1は学習どおり、0はベースモデル。",
        "system": "システムプロンプト",
        "system_hint": "空欄ならモデルの既定のまま",
        "sampling": "サンプリング",
        "temperature": "温度",
        "temperature_info": "0は常に最も確率の高いトークンを選び、大きいほど多様になります。",
        "top_p": "Top p",
        "top_p_info": "確率の合計がこの割合になる上位のトークンだけを使います。",
        "top_k": "Top k",
        "top_k_info": "上位この個数のトークンだけを使います。0は無効です。",
        "min_p": "Min p",
        "min_p_info": "最上位の確率のこの割合以上のトークンだけを使います。0は無効です。",
        "repetition_penalty": "繰り返しペナルティ",
        "repetition_penalty_info": "1より大きいと繰り返しが減ります。",
        "max_tokens": "最大トークン数",
        "max_tokens_info": "回答の長さの上限です。",
        "seed": "シード",
        "seed_info": "同じシードは同じ回答になります。-1はランダムです。",
        "drop_oldest": "コンテキストがいっぱいになったら古い会話から忘れる",
        "answering": "回答中…",
        "done": "{tokens}トークン · {seconds:.1f}秒 · {speed:.1f}トークン/秒",
        "cut": "回答は最大トークン数（{tokens}）で打ち切られました。長い回答には増やしてください。",
        "full": "コンテキスト（{context}トークン）がいっぱいで、回答は打ち切られました。"
        "会話を消去するか、古い会話から忘れる設定にしてください。",
        "dropped": "収まりきらない古いメッセージ{count}件を省きました。",
        "stopped": "停止しました。",
        "overflow": "会話に{prompt}トークン、回答に{answer}トークン必要ですが、コンテキストは"
        "{context}トークンです。メッセージを短くするか、最大トークン数を減らすか、会話を消去してください。",
        "busy": "順番待ちの人が多すぎます。少し待ってからもう一度お試しください。",
        "gone": "アダプター「{name}」はもう読み込まれていません。ページを再読み込みしてください。",
    },
}


def language(accepted: str | None) -> str:
    """The page's language for an Accept-Language header: what the browser's own locale gives."""
    first = (accepted or "").split(",")[0].strip().lower()
    return "ja" if first.split(";")[0].split("-")[0] == "ja" else "en"


def say(language: str, key: str, **values: object) -> str:
    """One text with its values filled in."""
    return TEXTS[language][key].format(**values)


def explain(error: QlorachatError, language: str) -> str:
    """An error as one line for a visitor; what has no words here speaks for itself."""
    match error:
        case ContextOverflow():
            return say(
                language,
                "overflow",
                prompt=error.prompt_tokens,
                answer=error.max_tokens,
                context=error.context_length,
            )
        case QueueFull():
            return say(language, "busy")
        case UnknownName(kind="adapter"):
            return say(language, "gone", name=error.name)
        case _:
            return str(error)
