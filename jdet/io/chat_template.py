"""Chat templates: messages to prompt text, as transformers renders them."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jdet.io.errors import CheckpointError


class ChatTemplate:
    """A jinja2 chat template in a sandbox (the template comes with the model, not from us).

    ``strftime_now``, which transformers offers to templates, is left out on purpose: with
    it some models' prompts, and so their bits, would change every day. Such templates fall
    back to a date of their own.

    Args:
        text: The template's text.
        tokens: What it may name besides the messages (``bos_token``, ``eos_token``, ...).
        source: The file it came from, for messages.

    Attributes:
        text: As given.
        tokens: As given.
    """

    def __init__(self, text: str, tokens: Mapping[str, str], source: str) -> None:
        self.text = text
        self.tokens = dict(tokens)
        self._source = source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders the messages.

        Args:
            messages: With the roles and keys that the template knows.
            add_generation_prompt: Whether the assistant's turn is begun at the end.
            tools: JSON schemas of functions.
            variables: What else the template may be told (``enable_thinking``).

        Raises:
            CheckpointError: The template is broken, refuses these messages, or does not look
                at the tools or a variable.
        """
        from jinja2 import TemplateError

        given = dict(variables or {})
        if tools is not None:
            given["tools"] = list(tools)
        template, known = self._compiled
        if unused := [name for name in given if name not in known]:
            raise CheckpointError(
                f"{self._source}: the chat template has no use for {', '.join(unused)}; it may be"
                f" given {', '.join(sorted(known)) or 'nothing'}"
            )
        values = {"tools": None, "documents": None, **self.tokens, **given}
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise CheckpointError(
                f"{self._source}: the chat template cannot render these messages: {error}"
            ) from None

    @cached_property
    def _compiled(self) -> tuple[Any, set[str]]:
        """The template, and the names that a caller may give it."""
        from jinja2 import TemplateError, meta
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            # jinja2's own filter escapes HTML characters.
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        try:
            names = meta.find_undeclared_variables(environment.parse(self.text))
        except TemplateError as error:
            raise CheckpointError(f"{self._source}: broken chat template: {error}") from None
        known = names - {"messages", "add_generation_prompt", *self.tokens, *environment.globals}
        return environment.from_string(self.text), known
