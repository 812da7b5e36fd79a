"""What all parts of the page share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suwen.generation_settings import GenerationSettings
from suwen.page.texts import Language, request_language

if TYPE_CHECKING:
    from suwen.chat_models import ChatModel
    from suwen.page.feedback import Feedback
    from suwen.retrieval.search import KnowledgeBase
    from suwen.retrieval.settings import RetrievalSettings

QUESTION_CHARACTERS = 8000
ANSWER_TOKENS = 4096


@dataclass(frozen=True)
class Page:
    models: dict[str, ChatModel]
    settings: GenerationSettings
    system_prompt: str
    language: str  # auto, zh or en
    translate: Callable[[str], Any]
    feedback: Feedback
    knowledge: KnowledgeBase | None
    retrieval: RetrievalSettings
    folder: str  # for the files of sessions, gone with the server
    at_once: int  # answers under way

    @property
    def longest_answer(self) -> int:
        return max(ANSWER_TOKENS, self.settings.max_new_tokens)

    def language_of(self, request: Any) -> Language:
        """Of the words that the server makes for one browser."""
        headers = request.headers if request is not None else {}
        return request_language(self.language, headers.get("accept-language", ""))
