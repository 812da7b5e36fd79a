"""Build an index of passages on disk; files that did not change are not read again.

index.json              settings, files with their hashes, counts; written last, so that it never tells of less
passages-<hash>/        one build: passages.jsonl, offsets.npy, BM25's arrays, embeddings.npy where asked for, and a
                        manifest of their hashes, which are compared before an index is opened
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from suwen.command_line import make_folder
from suwen.manifest import find_damage, publish
from suwen.personal_data import find_personal_data, mask_personal_data
from suwen.readers import Refusal, find_files, hash_file
from suwen.retrieval import passages as passages_module
from suwen.retrieval import terms as terms_module
from suwen.retrieval.bm25 import BLOCK_PASSAGES, PostingsBuilder, save
from suwen.retrieval.documents import DOCUMENT_SUFFIXES, read_sections
from suwen.retrieval.passages import Passage, Section, cut_passages

FORMAT = 4
# What decides the content of an index besides its documents
VERSIONS = {"format": FORMAT, "passages": passages_module.VERSION, "terms": terms_module.VERSION}


@dataclass
class BuildReport:
    """What a build read and left out."""

    files: int = 0
    unchanged: int = 0  # files taken over from the build before
    bytes: int = 0  # of all files
    passages: int = 0
    characters: int = 0
    ignored: list[str] = field(default_factory=list)  # files of other kinds in the folders
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    refusals: list[str] = field(default_factory=list)  # messages
    flagged: Counter[str] = field(default_factory=Counter)  # passages, by reason
    pii: str = "off"
    personal_data: Counter[str] = field(default_factory=Counter)  # found (and masked), by kind

    def lines(self) -> list[str]:
        taken = f", {self.unchanged} of them unchanged" if self.unchanged else ""
        lines = [
            f"{self.files} files ({self.bytes / 1e6:.1f} MB){taken}: {self.passages} passages, "
            f"{self.characters} characters"
        ]
        if self.ignored:
            lines.append(f"passed over {len(self.ignored)} files of other kinds: {', '.join(self.ignored[:5])}")
        lines += [f"left out: {count} × {reason}" for reason, count in self.refused.most_common()]
        lines += [f"  {message}" for message in self.refusals[:10]]
        lines += [f"flagged: {count} passages with {reason}" for reason, count in self.flagged.most_common()]
        if self.pii != "off":
            done = "masked" if self.pii == "mask" else "found and left as it is"
            kinds = ", ".join(f"{count} × {kind}" for kind, count in self.personal_data.most_common()) or "none"
            lines.append(f"personal data, {done}: {kinds}")
        return lines


def build_index(
    documents: list[str],
    output_dir: str,
    passage_characters: int = 400,
    embed: Any = None,
    progress: bool = False,
    pii: str = "off",
) -> BuildReport:
    """Index the documents behind files, folders or globs into `output_dir`.

    Args:
        passage_characters: about so many a passage.
        embed: a `dense.Embedder` for dense retrieval; None for BM25 alone.
        pii: what becomes of personal data (suwen/personal_data.py): "report" counts it, "mask" puts the name of its
            kind in its place, before anything is written.

    Raises:
        ValueError: no document, nothing readable in them, or `output_dir` holds something else.
    """
    from filelock import FileLock

    folder = Path(output_dir)
    named, ignored = name_files(documents)
    ours = (folder / "index.json").is_file()
    if not ours and folder.exists() and (not folder.is_dir() or any(f.name[0] != "." for f in folder.iterdir())):
        raise ValueError(f"--output_dir: {output_dir} holds something else, expected a new folder or an index")
    make_folder(folder)
    with FileLock(folder / ".lock"):
        for left in folder.glob(".building-*"):  # of a build that was killed
            shutil.rmtree(left)
        unfinished = folder / f".building-{os.getpid()}"
        unfinished.mkdir()
        try:
            report, record = _build(named, folder, unfinished, passage_characters, embed, progress, pii)
            if not report.passages:
                raise ValueError(f"--documents: found nothing readable; {'; '.join(report.refusals[:3])}")
            _publish(folder, unfinished, record)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    report.ignored = ignored
    return report


def _build(
    named: dict[str, Path],
    folder: Path,
    unfinished: Path,
    passage_characters: int,
    embed: Any,
    progress: bool,
    pii: str,
) -> tuple[BuildReport, dict[str, Any]]:
    """Write everything but index.json into `unfinished`; what that will say is the second result."""
    settings = {**VERSIONS, "passage_characters": passage_characters, "pii": pii}
    before, store = _build_before(folder)
    known = before["files"] if before and before["settings"] == settings else {}
    report, files, content = BuildReport(files=len(named), pii=pii), {}, hashlib.sha256()
    builder, offsets = PostingsBuilder(), [0]
    hashes: list[bytes] = []
    block: list[str] = []
    total = sum(file.stat().st_size for file in named.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="indexing", disable=not progress)
    with open(unfinished / "passages.jsonl", "wb") as stream, bar:
        for name, file in named.items():
            digest, size, start = hash_file(file), file.stat().st_size, len(hashes)
            refused: list[tuple[str, str]] = []
            personal: Counter[str] = Counter()
            if store is not None and known.get(name, {}).get("sha256") == digest:
                report.unchanged += 1
                refused, personal = known[name]["refused"], Counter(known[name]["personal_data"])
                first, count = known[name]["passages"]
                found: Iterator[Passage] = (store[row] for row in range(first, first + count))
            else:
                sections = _sections(file, name, refused)
                if pii != "off":
                    sections = _without_personal_data(sections, pii == "mask", personal)
                found = cut_passages(sections, passage_characters)
            for passage in found:
                line = json.dumps(passage.to_dict(), ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
                stream.write(line)
                content.update(line)
                offsets.append(offsets[-1] + len(line))
                hashes.append(hashlib.sha256(passage.titled.encode("utf-8", errors="replace")).digest())
                block.append(passage.indexed)
                report.characters += len(passage.text)
                report.flagged.update(passage.flags)
                if len(block) == BLOCK_PASSAGES:
                    builder.add(block)
                    block = []
            spread = [start, len(hashes) - start]
            files[name] = {"sha256": digest, "bytes": size, "passages": spread, "refused": refused}
            files[name]["personal_data"] = personal
            report.personal_data.update(personal)
            report.refused.update(reason for reason, _ in refused)
            report.refusals += [message for _, message in refused]
            report.bytes += size
            bar.update(size)
    if block:
        builder.add(block)
    report.passages = builder.count
    if report.passages:
        np.save(unfinished / "offsets.npy", np.array(offsets, dtype=np.int64), allow_pickle=False)
        save(unfinished, *builder.finish())
        (unfinished / "hashes.bin").write_bytes(b"".join(hashes))
        if embed is not None:
            content.update(embed.fingerprint["sha256"].encode())
            usable = before is not None and before["embedding"] == embed.fingerprint
            old = folder / before["data"] if before and usable else None
            write_embeddings(unfinished, hashes, embed, old, progress)
    return report, {
        "settings": settings,
        "data": f"passages-{content.hexdigest()[:16]}",
        "passages": report.passages,
        "characters": report.characters,
        "embedding": embed.fingerprint if embed is not None else None,
        "flagged": dict(report.flagged),
        "files": files,
    }


def _build_before(folder: Path) -> tuple[dict[str, Any] | None, PassageStore | None]:
    """What index.json says, and its passages; None where there is none, or where it is damaged and to be built anew."""
    try:
        record = read_index_file(folder)
        return record, PassageStore(whole_build(folder, record))
    except (ValueError, OSError):
        return None, None


def _publish(folder: Path, unfinished: Path, record: dict[str, Any]) -> None:
    """Put a finished build in the place of the one before; a reader finds one or the other."""
    data = folder / record["data"]
    if find_damage(data):  # else the same content is there already
        publish(unfinished, data, {})
    temporary = folder / ".index.json"
    temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "index.json")
    for other in folder.glob("passages-*"):
        if other != data:  # programs that have it open keep their memory map
            shutil.rmtree(other, ignore_errors=True)


def _sections(file: Path, name: str, refused: list[tuple[str, str]]) -> Iterator[Section]:
    for item in read_sections(file, name):
        if isinstance(item, Refusal):
            refused.append((item.reason, item.message))
        else:
            yield item


def _without_personal_data(sections: Iterator[Section], mask: bool, counts: Counter[str]) -> Iterator[Section]:
    """The sections, with personal data masked where asked for; what was found is added to `counts`, by kind."""
    for section in sections:
        in_title, in_text = find_personal_data(section.title), find_personal_data(section.text)
        counts.update(finding.kind for finding in in_text)
        if section.title not in section.text:  # it is often the text's first line
            counts.update(finding.kind for finding in in_title)
        if mask:
            title = mask_personal_data(section.title, in_title)
            section = replace(section, title=title, text=mask_personal_data(section.text, in_text))
        yield section


def name_files(documents: list[str]) -> tuple[dict[str, Path], list[str]]:
    """Files by the name that citations show: without the path to the folder that was given."""
    named: dict[str, Path] = {}
    ignored: list[str] = []
    for path in documents:
        found, passed_over = find_files(path, "--documents", DOCUMENT_SUFFIXES)
        root = Path(path).expanduser()
        for file in found:
            name = file.relative_to(root).as_posix() if root.is_dir() else file.name
            if named.setdefault(name, file) != file:
                raise ValueError(
                    f"--documents: {named[name]} and {file} would both be shown as {name}; give the folder above them"
                )
        ignored += map(str, passed_over)
    return named, ignored


def read_index_file(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if not isinstance(record["files"], dict) or not (folder / record["data"]).is_dir():
            raise ValueError
        return record
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}: not a finished index, expected one that tools/build_index.py made") from None


def whole_build(folder: Path, record: dict[str, Any]) -> Path:
    """The folder of the build that index.json tells of, once its files are found as they were written."""
    data = folder / str(record["data"])
    if damage := find_damage(data):
        raise ValueError(f"{data}: {damage}; expected the index as it was built, build it again")
    return data


class PassageStore:
    """The passages of a build, by their row; read from a memory map."""

    def __init__(self, folder: Path) -> None:
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        self.lines: np.ndarray = np.memmap(folder / "passages.jsonl", mode="r", dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Passage:
        return Passage.from_dict(json.loads(bytes(self.lines[self.offsets[row] : self.offsets[row + 1]])))


def write_embeddings(folder: Path, hashes: list[bytes], embed: Any, old: Path | None, progress: bool) -> None:
    """(N, D) float32 unit vectors; those of passages that the build before had are taken over."""
    known: dict[bytes, int] = {}
    if old is not None:
        content = (old / "hashes.bin").read_bytes()
        known = {content[at : at + 32]: at // 32 for at in range(0, len(content), 32)}
        vectors = np.load(old / "embeddings.npy", mmap_mode="r", allow_pickle=False)
    store = PassageStore(folder)
    result = np.lib.format.open_memmap(
        folder / "embeddings.npy", mode="w+", dtype=np.float32, shape=(len(hashes), embed.dimension)
    )
    missing = [row for row, digest in enumerate(hashes) if digest not in known]
    for row, digest in enumerate(hashes):
        if digest in known:
            result[row] = vectors[known[digest]]
    for at in range(0, len(missing), BLOCK_PASSAGES):
        rows = missing[at : at + BLOCK_PASSAGES]
        result[rows] = embed.passages([store[row].titled for row in rows], progress)
    result.flush()
