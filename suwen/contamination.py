"""Whether test items stand in training data: verbatim, with options reordered, or reworded.

Texts are compared as their letters and digits alone (NFKC, lower case), so width, punctuation, line breaks and option
marks make no difference. Training text is read as a stream in large pieces: grams of 8 characters that an item shares
with a place in it make that place a candidate, and what stands there is then compared character by character. The
classical figure, the share of an item's 13-grams in one training row (Brown et al. 2020, arXiv:2005.14165, appendix C),
is reported beside it.

Without the data its sketch (`suwen.sketch`) says which of an item's 13-grams a training has read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from suwen.grams import Codes, hash_grams, sorted_unique, to_codes, to_text
from suwen.lineage import changed, read_json
from suwen.sketch import FILE as SKETCH_FILE
from suwen.sketch import NGRAM, Sketch

SEED_GRAM, SHORT = 8, 3  # characters of a candidate's grams, of the comparison's
SMALL_SEED = 4  # for items too short for SEED_GRAM
CHUNK_CHARACTERS = 1 << 17  # of training text at once: its arrays stay in the processor's cache
BLOCK = 512  # characters of training text in which the grams of one item are counted together
FILTER_BITS = 22
LEAST_QUESTION = 13  # characters of a question that say something by themselves
LONE_QUESTION = 30  # characters of a question that is not a stock phrase, even without its answer
LEAST_GRAMS = 9  # of an item's short grams, below which sharing most of them says nothing
NEAR = 0.6  # share of an item's grams of SHORT characters, from which it counts as reworded
OPTIONS_NEEDED = 0.5  # share of its options that must be there for it
LEAST_SKETCHED = 5  # 13-grams of an item that a sketch could hold, below which it says nothing
SKETCH_SHARE = 0.5  # share of an item's 13-grams in a sketch, from which it counts as seen
# What was found, the worst first. grams: by a sketch, which knows 13-grams only; unknown: too short for one
KINDS = ("exact", "reordered", "question", "near", "grams", "clean", "unknown")
DIRTY = KINDS[:5]


# ---------------------------------------------------------------------------------------------------------------- items


class SoughtItem(NamedTuple):
    """What is looked for: a question, its options, and the texts of the right answer."""

    id: str
    question: str
    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


class Match(NamedTuple):
    """The best place found for an item. `score` is the share of its short grams, `grams` that of its 13-grams."""

    kind: str
    score: float
    grams: float
    where: str
    excerpt: str


@dataclass
class _Prepared:
    """A test item as it is compared."""

    item: SoughtItem
    question: str = ""
    options: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    short: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))  # grams of question and options
    length: int = 0
    tiny: bool = False  # can be found with its options in their order only


def printed(item: SoughtItem) -> str:
    """Question and options in their order, with their letters."""
    return item.question + "".join(f" {chr(65 + i)} {option}" for i, option in enumerate(item.options))


def segments(item: SoughtItem) -> list[Codes]:
    """Question and options apart, so that no gram depends on the order of the options."""
    return [to_codes(text) for text in (item.question, *item.options)]


def segment_grams(parts: Sequence[Codes], n: int) -> np.ndarray:
    found = [hash_grams(part, n) for part in parts]
    return sorted_unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint64)


class GramIndex:
    """Which items hold a gram: a bit filter that most grams of a training text fail, then a sorted table."""

    def __init__(self, n: int, grams: Sequence[np.ndarray], items: Sequence[int]) -> None:
        self.n = n
        owners: np.ndarray = np.repeat(np.array(items, dtype=np.int64), [len(g) for g in grams])
        hashes = np.concatenate(grams) if grams else np.zeros(0, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        self.owners = owners[order]
        self.hashes, self.starts = np.unique(hashes[order], return_index=True)
        self.counts: np.ndarray = np.diff(np.append(self.starts, len(owners)))
        self.filter: np.ndarray = np.zeros(1 << FILTER_BITS, dtype=bool)
        self.filter[self._slot(self.hashes)] = True

    @staticmethod
    def _slot(hashes: np.ndarray) -> np.ndarray:
        return hashes & np.uint64((1 << FILTER_BITS) - 1)

    def find(self, codes: Codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(positions, items, grams) of all hits in a text."""
        none: np.ndarray = np.zeros(0, dtype=np.int64)
        if not len(self.hashes):
            return none, none, none
        found = hash_grams(codes, self.n)
        positions = np.flatnonzero(self.filter[self._slot(found)])
        wanted = found[positions]
        places = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        same = self.hashes[places] == wanted
        positions, places = positions[same], places[same]
        times = self.counts[places]
        # of each hit, the items that own its gram
        first: np.ndarray = np.repeat(self.starts[places] - np.append(0, np.cumsum(times)[:-1]), times)
        return np.repeat(positions, times), self.owners[first + np.arange(times.sum())], np.repeat(places, times)


def distinct_grams(owners: np.ndarray, cells: np.ndarray, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many different grams each owner has in each cell, from its hits.

    Returns:
        (2, P) the pairs of owner and cell that have any, and (P,) their counts.
    """
    width, depth = int(cells.max()) + 1, int(grams.max()) + 1
    assert (int(owners.max()) + 1) * width * depth < 2**63
    hits = sorted_unique((owners * width + cells) * depth + grams)
    pairs, counts = np.unique(hits // depth, return_counts=True)
    return np.stack(np.divmod(pairs, width)), counts


class Detector:
    """Looks for test items in training text; `matches` holds the best place of each item found so far."""

    def __init__(self, items: Sequence[SoughtItem]) -> None:
        self.items = list(items)
        self.prepared: list[_Prepared] = []
        self.matches: dict[str, Match] = {}
        self.rows = self.characters = 0
        long, seeds, small = [], [], []
        large_items, small_items = [], []
        needed: list[int] = []
        for number, item in enumerate(self.items):
            parts = segments(item)
            texts = [to_text(part) for part in parts]
            answers = [to_text(to_codes(answer)) for answer in item.answers]
            prepared = _Prepared(item, texts[0], [t for t in texts[1:] if t], [a for a in answers if a])
            prepared.short = segment_grams(parts, SHORT)
            prepared.length = sum(map(len, texts))
            self.prepared.append(prepared)
            long.append(segment_grams(parts, NGRAM))
            grams = segment_grams(parts, SEED_GRAM)
            if len(grams) >= SEED_GRAM:
                seeds.append(grams)
                large_items.append(number)
                needed.append(int(np.clip(0.12 * len(grams), 3, 10)))
            else:
                small.append(segment_grams(parts, SMALL_SEED))
                if len(small[-1]) < 2:  # the question as it is printed, the only thing long enough to look for
                    small[-1] = segment_grams([to_codes(printed(item))], SMALL_SEED)
                    prepared.tiny = True
                small_items.append(number)
                needed.append(max(2, int(0.4 * len(small[-1]))))
        self.needed: np.ndarray = np.array(needed, dtype=np.int64)
        self.long = GramIndex(NGRAM, long, range(len(long)))
        self.long_counts: np.ndarray = np.array([len(grams) for grams in long])
        self.best_grams: np.ndarray = np.zeros(len(self.items))
        self.indices = [GramIndex(SEED_GRAM, seeds, large_items), GramIndex(SMALL_SEED, small, small_items)]

    def scan(self, rows: Iterable[tuple[str, str]]) -> None:
        """Look through training rows, each with its place."""
        texts: list[str] = []
        wheres: list[str] = []
        size = 0
        for where, text in rows:
            texts.append(text.replace("\0", " "))
            wheres.append(where)
            size += len(text)
            if size >= CHUNK_CHARACTERS:
                self._scan_chunk(texts, wheres)
                texts, wheres, size = [], [], 0
        if texts:
            self._scan_chunk(texts, wheres)

    def _scan_chunk(self, texts: list[str], wheres: list[str]) -> None:
        codes = to_codes("\0".join(texts))
        self.rows += len(texts)
        self.characters += sum(map(len, texts))
        ends: np.ndarray = np.append(np.flatnonzero(codes == 0), len(codes))
        positions, owners, grams = self.long.find(codes)
        if len(positions):
            found, counts = distinct_grams(owners, np.asarray(np.searchsorted(ends, positions)), grams)
            np.maximum.at(self.best_grams, found[0], counts / self.long_counts[found[0]])
        for index in self.indices:
            positions, owners, grams = index.find(codes)
            if not len(positions):
                continue
            rows: np.ndarray = np.asarray(np.searchsorted(ends, positions))
            candidates: set[tuple[int, int, int]] = set()
            for shift in (0, BLOCK // 2):
                # positions never fall, so each change of row or block begins a new cell
                blocks: np.ndarray = (positions + shift) // BLOCK
                begins = np.flatnonzero(np.diff(rows, prepend=-1) | np.diff(blocks, prepend=-1))
                cells: np.ndarray = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(positions))))
                found, counts = distinct_grams(owners, cells, grams)
                chosen = found[:, counts >= self.needed[found[0]]]
                first = begins[chosen[1]]
                starts = blocks[first] * BLOCK - shift
                candidates.update(zip(chosen[0].tolist(), rows[first].tolist(), starts.tolist(), strict=True))
            for owner, row, start in candidates:
                self._compare(owner, codes, int(ends[row - 1]) + 1 if row else 0, int(ends[row]), start, wheres[row])

    def _compare(self, owner: int, codes: Codes, first: int, last: int, start: int, where: str) -> None:
        """Compare an item with the training text around one place."""
        prepared = self.prepared[owner]
        known = self.matches.get(prepared.item.id)
        if known and known.kind == "exact":
            return
        margin = prepared.length + 64
        window = codes[max(first, start - margin) : min(last, start + BLOCK + margin)]
        score = best_containment(prepared.short, hash_grams(window, SHORT), 2 * prepared.length)
        kind = self._kind(prepared, to_text(window), score)
        if kind == "clean" and known:
            return
        match = Match(kind, round(score, 4), 0.0, where, excerpt(to_text(window), prepared.question))
        if known is None or (KINDS.index(kind), -score) < (KINDS.index(known.kind), -known.score):
            self.matches[prepared.item.id] = match

    @staticmethod
    def _kind(prepared: _Prepared, window: str, score: float) -> str:
        place = window.find(prepared.question) if prepared.question else -1
        if place >= 0 and prepared.options and all(option in window for option in prepared.options):
            at, ordered = place + len(prepared.question), True
            for option in prepared.options:
                at = window.find(option, at)
                if at < 0:
                    ordered = False
                    break
                at += len(option)
            return "exact" if ordered else "reordered"
        if place >= 0:
            answered = bool(prepared.answers) and all(answer in window for answer in prepared.answers)
            if not prepared.options and len(prepared.question) >= LEAST_QUESTION:
                return "exact"
            if len(prepared.question) >= (LEAST_QUESTION if answered else LONE_QUESTION):
                return "question"
        if score < NEAR or len(prepared.short) < LEAST_GRAMS:
            return "clean"
        # Many questions begin alike: their options must be there too, letter for letter or nearly so
        grams = character_grams(window)
        near = [len(own & grams) >= 0.5 * len(own) for own in map(character_grams, prepared.options)]
        return "near" if sum(near) >= OPTIONS_NEEDED * len(near) else "clean"

    def results(self) -> list[Match]:
        """The best match of each item, in the order of the items."""
        found = []
        for i, item in enumerate(self.items):
            prepared = self.prepared[i]
            short = prepared.tiny or not prepared.options and len(prepared.question) < LEAST_QUESTION
            match = self.matches.get(item.id, Match("clean", 0.0, 0.0, "", ""))
            if match.kind == "clean" and short:
                match = match._replace(kind="unknown")
            found.append(match._replace(grams=round(float(self.best_grams[i]), 4)))
        return found


def character_grams(text: str) -> set[str]:
    """Pairs of characters; a single one by itself."""
    return {text[i : i + 2] for i in range(max(1, len(text) - 1))}


def best_containment(grams: np.ndarray, text: np.ndarray, width: int) -> float:
    """The largest share of `grams` within any `width` successive grams of a text.

    Args:
        grams: (G,) different hashes, sorted.
        text: (N,) hashes in the order of the text.
    """
    if not len(grams) or not len(text):
        return 0.0
    places = np.minimum(np.searchsorted(grams, text), len(grams) - 1)
    hits = np.where(grams[places] == text, places, -1)
    positions = np.flatnonzero(hits >= 0)
    counts: dict[int, int] = defaultdict(int)
    best = begin = 0
    for end, position in enumerate(positions):
        counts[int(hits[position])] += 1
        while position - positions[begin] >= width:
            gram = int(hits[positions[begin]])
            counts[gram] -= 1
            if not counts[gram]:
                del counts[gram]
            begin += 1
        best = max(best, len(counts))
        del end
    return best / len(grams)


def excerpt(window: str, question: str, length: int = 80) -> str:
    """The part of a training text that begins where the question does, or with the longest beginning found of it."""
    for size in range(min(len(question), 24), 3, -1):
        for start in range(0, max(1, len(question) - size), size):
            if (place := window.find(question[start : start + size])) >= 0:
                return window[max(0, place - start) :][:length]
    return window[:length]


# --------------------------------------------------------------------------------------------------------------- sketch


def check_sketch(items: Sequence[SoughtItem], sketch: Sketch) -> list[Match]:
    """The share of each item's 13-grams that a sketch holds; of those it could hold."""
    matches = []
    for item in items:
        possible, share = sketch.shares(segment_grams(segments(item), NGRAM))
        kind = "unknown" if possible < LEAST_SKETCHED else "grams" if share >= SKETCH_SHARE else "clean"
        matches.append(Match(kind, round(share, 4), round(share, 4), "", ""))
    return matches


def find_sketches(path: str) -> tuple[list[Path], list[str]]:
    """The sketches of a model: of its last training, of that of its start, and so on to the base.

    Args:
        path: folder of a stage or of a merged model, or a sketch itself.

    Returns:
        the files, and a line for each model on the way whose training data is not known.

    Raises:
        ValueError: there is none at all.
    """
    if Path(path).is_file():
        return [Path(path)], []
    if Path(path).is_file():
        return [Path(path)], []
    found: list[Path] = []
    unknown: list[str] = []
    seen: set[Path] = set()
    link: dict[str, Any] = {"path": path}
    while (folder := Path(link["path"])).is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        if changed(str(folder), link):
            unknown.append(f"{folder}: has changed since it was gone on from; what it had read by then is not known")
            break
        if (folder / SKETCH_FILE).is_file():
            found.append(folder / SKETCH_FILE)
        record = read_json(folder / "run.json").get("lineage") or read_json(folder / "merge.json").get("adapters")
        if not (folder / SKETCH_FILE).is_file() and not (folder / "merge.json").is_file():
            unknown.append(f"{folder}: has no sketch; what it was trained on is not known")
        if not record:
            break
        link = record[-1]
    if not found:
        raise ValueError(
            f"--sketch {path}: found none, expected {SKETCH_FILE}, or the folder of a training that left one"
        )
    return found, unknown
