"""How text becomes tokens: one choice for training and for prediction."""

from dataclasses import dataclass
from typing import Any

PROMPT_FORMATS = ("auto", "chat", "plain")


@dataclass(frozen=True)
class TextFormat:
    """How text becomes tokens; the same in training and in prediction, so it is kept beside the adapter.

    prompt_format  "chat": prompt and response are a user and an assistant turn of the tokenizer's chat template;
                   "plain": prompt + separator, response + end-of-text; "auto": chat where there is a template
    """

    max_length: int = 512
    prompt_format: str = "auto"
    separator: str = "\n"
    train_on_prompt: bool = False

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length: expected at least 1 token, got {self.max_length}")
        if self.prompt_format not in PROMPT_FORMATS:
            raise ValueError(f"prompt_format: expected one of {PROMPT_FORMATS}, got {self.prompt_format!r}")

    def is_chat(self, tokenizer: Any) -> bool:
        """True if prompts go through the chat template. Raises ValueError if they must and there is none."""
        if self.prompt_format == "chat" and not tokenizer.chat_template:
            raise ValueError("prompt_format='chat': the tokenizer has no chat template; use prompt_format='plain'")
        return self.prompt_format != "plain" and bool(tokenizer.chat_template)
