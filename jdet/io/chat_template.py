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

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Renders the messages.

        Raises:
            CheckpointError: The template is broken, or refuses these messages.
        """
        from jinja2 import TemplateError

        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise CheckpointError(
                f"{self._source}: the chat template cannot render these messages: {error}"
            ) from None

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateError
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
        return environment.from_string(self.text)
