"""Build an index of passages on disk; files that did not change are not read again.

index.json              settings, files with their hashes, counts; written last, so that it never tells of less
passages-<hash>/        one build: passages.jsonl, offsets.npy, BM25's arrays, embeddings.npy where asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suwen.readers import Refusal, find_files, hash_file
from suwen.retrieval import passages as passages_module
from suwen.retrieval import terms as terms_module
from suwen.retrieval.bm25 import PostingsBuilder, save
from suwen.retrieval.documents import DOCUMENT_SUFFIXES, read_sections
from suwen.retrieval.passages import Passage, Section, cut_passages

FORMAT = 1
BLOCK_PASSAGES = 4096
SHOWN_REFUSALS = 1000  # of each build in index.json; all of them are counted


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
        return lines


def build_index(
    documents: list[str], output_dir: str, passage_characters: int = 400, embed: Any = None, progress: bool = False
) -> BuildReport:
    """Index the documents behind files, folders or globs into `output_dir`.

    Args:
        passage_characters: about so many a passage.
        embed: a `dense.Embedder` for dense retrieval; None for BM25 alone.

    Raises:
        ValueError: no document, nothing readable in them, or `output_dir` holds something else.
    """
    from tqdm import tqdm

    folder = Path(output_dir)
    named, ignored = name_files(documents)
    settings = {
        "format": FORMAT,
        "passages": passages_module.VERSION,
        "terms": terms_module.VERSION,
        "passage_characters": passage_characters,
    }
    before = read_index_file(folder) if (folder / "index.json").is_file() else None
    if before is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir: {output_dir} holds something else, expected a new folder or an index")
    known = before["files"] if before and before["settings"] == settings else {}
    store = PassageStore(folder / before["data"]) if before and known else None
    report = BuildReport(files=len(named), ignored=ignored)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".building-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        builder, files, content = PostingsBuilder(), {}, hashlib.sha256()
        offsets, hashes, block = [0], [], []
        total = sum(file.stat().st_size for file in named.values())
        with (
            open(unfinished / "passages.jsonl", "wb") as stream,
            tqdm(total=total, unit="B", unit_scale=True, desc="indexing", disable=not progress) as bar,
        ):
            for name, file in named.items():
                digest, size = hash_file(file), file.stat().st_size
                start = len(offsets) - 1
                if store is not None and known.get(name, {}).get("sha256") == digest:
                    report.unchanged += 1
                    refused = known[name]["refused"]
                    first, count = known[name]["passages"]
                    found: Iterator[Passage] = (store[row] for row in range(first, first + count))
                else:
                    refused = []
                    found = cut_passages(_sections(file, name, refused), passage_characters)
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
                files[name] = {
                    "sha256": digest,
                    "bytes": size,
                    "passages": [start, len(offsets) - 1 - start],
                    "refused": refused,
                }
                report.refused.update(reason for reason, _ in refused)
                report.refusals += [message for _, message in refused[: SHOWN_REFUSALS - len(report.refusals)]]
                report.bytes += size
                bar.update(size)
        if block:
            builder.add(block)
        report.passages = builder.count
        if not report.passages:
            raise ValueError(f"--documents: found nothing readable in {', '.join(documents)}; {report.refusals[:1]}")
        np.save(unfinished / "offsets.npy", np.array(offsets, dtype=np.int64), allow_pickle=False)
        save(unfinished, *builder.finish())
        embedding = None
        if embed is not None:
            embedding = embed.fingerprint
            old = folder / before["data"] if before and before.get("embedding") == embedding else None
            content.update(embedding["sha256"].encode())
            write_embeddings(unfinished, hashes, embed, old, progress)
        (unfinished / "hashes.bin").write_bytes(b"".join(hashes))
        for file in unfinished.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        data = f"passages-{content.hexdigest()[:16]}"
        if (folder / data).exists():
            shutil.rmtree(unfinished)  # the same content as before
        else:
            os.replace(unfinished, folder / data)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    record = {
        "settings": settings,
        "data": data,
        "passages": report.passages,
        "characters": report.characters,
        "embedding": embedding,
        "flagged": dict(report.flagged),
        "files": files,
    }
    temporary = folder / f".index.json-{os.getpid()}"
    temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "index.json")
    for other in folder.glob("passages-*"):
        if other.name != data:  # programs that have it open keep their memory map
            shutil.rmtree(other, ignore_errors=True)
    return report


def _sections(file: Path, name: str, refused: list[tuple[str, str]]) -> Iterator[Section]:
    for item in read_sections(file, name):
        if isinstance(item, Refusal):
            refused.append((item.reason, item.message))
        else:
            yield item


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


class PassageStore:
    """The passages of a build, by their row; read from a memory map."""

    def __init__(self, folder: Path) -> None:
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        self.lines: np.ndarray = np.memmap(folder / "passages.jsonl", mode="r", dtype=np.uint8)
        if len(self.offsets) < 2 or self.offsets[-1] != len(self.lines):
            raise ValueError(f"{folder}: passages are cut off, expected a finished index; build it again")

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
