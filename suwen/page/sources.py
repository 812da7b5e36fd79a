"""The sources of an answer on the page, and the private knowledge base of a session's own files."""

from __future__ import annotations

import html
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from suwen.page.texts import Language, reason_text, text
from suwen.retrieval.grounding import check_citations
from suwen.retrieval.settings import RetrievalSettings

if TYPE_CHECKING:
    from suwen.retrieval.search import Hit, KnowledgeBase

FILE_KINDS = (".pdf", ".docx", ".txt", ".md")
MOST_FILES = 10


@dataclass(frozen=True)
class Documents:
    """A session's files, indexed in a folder of their own."""

    folder: str
    knowledge: KnowledgeBase
    note: str

    def __deepcopy__(self, memo: object) -> Documents:
        return self  # sessions hand it about; its folder must stay one

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def index_files(paths: Sequence[str], parent: str, settings: RetrievalSettings, language: Language) -> Documents:
    """Index a session's files in a new folder of `parent`.

    Raises:
        ValueError: too many, or nothing readable in them.
    """
    from suwen.retrieval.index import build_index
    from suwen.retrieval.search import KnowledgeBase

    if len(paths) > MOST_FILES:
        raise ValueError(text("too_many_files", language, MOST_FILES))
    folder = tempfile.mkdtemp(prefix="documents-", dir=parent)  # for this user alone: mode 0700
    try:
        report = build_index(list(paths), folder)
        lines = [text("read", language, report.files, report.passages)]
        if report.refused:
            reasons = "; ".join(
                f"{count} × {reason_text(reason, language)}" for reason, count in report.refused.most_common()
            )
            lines.append(text("refused", language, report.refused.total(), reasons))
        if report.flagged:
            lines.append(text("flagged", language, report.flagged.total()))
        return Documents(folder, KnowledgeBase(folder, settings), "  \n".join(lines))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def sources_html(hits: Sequence[Hit], answer: str | None, language: Language, abstained: bool = False) -> str:
    """The passages that an answer was given; all that comes from documents is escaped.

    Args:
        answer: whose citations are checked; None while it is still being written.
    """
    if not hits:
        return f"<p>{text('sources_empty' if abstained else 'sources_none', language)}</p>"
    citations = check_citations(answer, [hit.passage for hit in hits]) if answer is not None else None
    parts = []
    for number, hit in enumerate(hits, start=1):
        passage = hit.passage
        place = [html.escape(passage.source)]
        place += [text("page", language, passage.page)] if passage.page is not None else []
        place += [f"{text('relevance', language)} {hit.relevance:.2f}", f"{text('score', language)} {hit.score:.2f}"]
        cited = citations is not None and number in citations.cited
        place += [f"<b>{text('cited', language)}</b>"] if cited else []
        parts.append(
            f'<details class="source"{" open" if cited or number == 1 else ""}><summary>[{number}] '
            f"{html.escape(passage.title)}<small>{' · '.join(place)}</small></summary>"
            f"<blockquote>{html.escape(passage.text)}</blockquote></details>"
        )
    if citations is not None:
        for key, numbers in (("unknown_sources", citations.unknown), ("unsupported_sources", citations.unsupported)):
            if numbers:
                parts.append(f'<p class="warning">{text(key, language, ", ".join(map(str, numbers)))}</p>')
    return "\n".join(parts)
