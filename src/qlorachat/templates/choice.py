"""Which prompt format a dialog gets: named, the adapter's, the checkpoint's own, or its card's."""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import PurePath

from qlorachat.errors import ConfigError, UnknownName
from qlorachat.protocols import Template, Tokenizer
from qlorachat.templates.checkpoint import CheckpointTemplate

CHECKPOINT = "checkpoint"  # the name of a checkpoint's own chat template


class TemplateChoice:
    """Chooses among the registered formats and the checkpoint's own, which is compiled once."""

    def __init__(
        self,
        registered: Mapping[str, Template],
        *,
        model_name: str,
        chat_template: str | None,
        tokenizer: Tokenizer,
    ) -> None:
        self._registered = registered
        self._model_name = model_name
        self._own = CheckpointTemplate(chat_template, tokenizer) if chat_template else None

    def choose(self, *names: str | None) -> Template:
        """The first of `names` that is set, else the checkpoint's own, else its card's format."""
        for name in names:
            if name is not None:
                return self._named(name)
        template = self._own or self._documented()
        if template is None:
            raise ConfigError(
                f"The model {self._model_name} has no chat template of its own: choose one of "
                f"{', '.join(sorted(self._registered))} with --template (in code, template=).",
                param="template",
            )
        return template

    def _named(self, name: str) -> Template:
        check_template_name(name, self._registered)
        if name != CHECKPOINT:
            return self._registered[name]
        if self._own is None:
            raise ConfigError(
                f"The model {self._model_name} has no chat template of its own.", param="template"
            )
        return self._own

    def _documented(self) -> Template | None:
        model = self._model_name.lower()
        tails = (model, PurePath(model).name)
        for template in self._registered.values():
            if any(fnmatch(tail, p.lower()) for tail in tails for p in template.models):
                return template
        return None


def check_template_name(name: str | None, registered: Mapping[str, Template]) -> None:
    """UnknownName for a name that is neither registered nor the checkpoint's own."""
    if name is not None and name not in {*registered, CHECKPOINT}:
        raise UnknownName("template", name, {*registered, CHECKPOINT})
