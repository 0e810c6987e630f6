"""Chats: turns become one text by the model's template, and what the model says is split into thought and answer.

A template is a program that a stranger wrote: it runs in Jinja's sandbox, which lets it see the messages and nothing
else, and what it may write is bounded.
"""

import json
from collections.abc import Sequence
from typing import Any

from refimpl.errors import Unsupported, Usage

THINK, END = "<think>", "</think>"
LONGEST = 1 << 24  # characters of a rendered chat
TEMPLATE = 1 << 20


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    thinking: bool = True,
    tools: Sequence[Any] | None = None,
) -> str:
    """The text of a chat, up to where the assistant is to speak.

    Raises Unsupported for a template that does not compile, breaks out of its sandbox or writes without end.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(template) > TEMPLATE:
        raise Unsupported(f"a chat template of {len(template):,} characters")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals = {"range": environment.globals["range"], "raise_exception": _raise}
    environment.globals["namespace"] = jinja2.utils.Namespace
    environment.filters["tojson"] = _to_json
    values = {
        "messages": list(messages),
        "add_generation_prompt": True,
        "enable_thinking": thinking,
        "tools": tools,
    }
    parts, size = [], 0
    try:
        for part in environment.from_string(template).generate(values):
            parts.append(part)
            size += len(part)
            if size > LONGEST:
                raise Unsupported(f"the chat template writes more than {LONGEST:,} characters")
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise Unsupported(f"the chat template fails: {error}") from None
    return "".join(parts)


def _raise(message: str) -> None:
    raise Usage(f"the chat template refuses: {message}")


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def starts_in_thought(prompt: str) -> bool:
    """Whether a prompt leaves the model inside its reasoning."""
    return prompt.rfind(THINK) > prompt.rfind(END)


class Splitter:
    """Tells reasoning from content while text streams in, as --reasoning-format deepseek does.

    Everything before the first </think> is reasoning where the prompt ended in <think> or the text begins with it.
    """

    def __init__(self, thinking: bool) -> None:
        self._thinking, self._begun, self._held = thinking, False, ""

    def add(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that can be told apart now; what may be the start of a tag waits."""
        self._held += text
        if not self._begun and not self._thinking:
            start = self._held.lstrip()
            if THINK.startswith(start) and start != THINK:
                return "", ""
            if start.startswith(THINK):
                self._thinking, self._held = True, start.removeprefix(THINK)
        self._begun = True
        if not self._thinking:
            said, self._held = self._held, ""
            return "", said
        reasoning, tag, rest = self._held.partition(END)
        if tag:
            self._thinking, self._held = False, ""
            return reasoning, rest.lstrip("\n")
        keep = next((k for k in range(len(END) - 1, 0, -1) if self._held.endswith(END[:k])), 0)
        reasoning, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """What is still held back."""
        held, self._held = self._held, ""
        return (held, "") if self._thinking else ("", held)


def split_reasoning(text: str, thinking: bool) -> tuple[str, str]:
    """(reasoning, content) of a whole answer."""
    splitter = Splitter(thinking)
    first, last = splitter.add(text), splitter.finish()
    return first[0] + last[0], first[1] + last[1]
