"""How likely a model finds each of several continuations of one prefix, such as the letters behind "答案：".

The continuations of a question form a tree behind its prefix: "A", "AB", "ABC" share their beginnings. Prefix and tree
are laid out in one row, each token once, several questions behind one another without padding; position ids restart at
each question, and an explicit attention mask lets a token see its own question's prefix and its own ancestors only
(the tree attention of SpecInfer, Miao et al. 2024, arXiv:2305.09781). The 31 sets of five letters cost 31 tokens more
than the question alone, where a row for each of them would cost 31 questions.

Not every model can be asked so (ALiBi, linear attention, sliding windows shorter than the question). A probe with real
questions compares with plain rows first, and such models are scored by plain rows of equal length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from suwen.encoding import default_beginning, token_ids

if TYPE_CHECKING:
    from suwen.encoding import ChatEncoder

CPU_TOKENS, GPU_TOKENS = 768, 4096  # in a row: attention is quadratic in it, and the overhead of a call fixed
PROBES = 3
# How far trees and plain rows may differ in the probe: (nats, share of the score), in float32 and in 16 or fewer bits
TOLERANCE, COARSE_TOLERANCE = (1e-3, 1e-4), (0.05, 5e-3)


class Choice(NamedTuple):
    """One question: the ids of its prefix and of each continuation; no continuation is empty."""

    prefix: list[int]
    continuations: list[list[int]]


class Tree(NamedTuple):
    """A question as it lies in a row: prefix, then the inner nodes of its tree, parents before children."""

    ids: list[int]
    parents: list[int]  # place of each node's parent in ids, -1 for a first token
    depth: list[int]  # position of each token
    paths: list[list[tuple[int, int]]]  # for each continuation: (place that predicts, token predicted)


def encode_choice(tokenizer: Any, prefix: str, texts: Sequence[str]) -> Choice:
    """Ids of a prefix and its continuations, as the tokenizer writes the whole.

    Where a tokenizer merges across the seam ("：A" as one token), the last ids of the prefix become part of every
    continuation: what is compared are always the likelihoods of whole texts. A prefix begins as every text does (BOS,
    or EOS where there is none), so that its first token has something to be predicted from.
    """
    beginning = default_beginning(tokenizer) or [tokenizer.eos_token_id]
    base, *wholes = token_ids(tokenizer, [prefix, *(prefix + text for text in texts)])
    shared = min([len(base), *(len(whole) - 1 for whole in wholes)])
    shared = min(next((i for i in range(shared) if base[i] != whole[i]), shared) for whole in wholes)
    return Choice(beginning + base[:shared], [whole[shared:] for whole in wholes])


def encode_answers(encoder: ChatEncoder, question: str, answers: Sequence[str]) -> Choice:
    """Ids of a question as it is served, and of two answers to it with their stop tokens."""
    chosen, rejected = answers
    pair = encoder.encode_pair([{"role": "user", "content": question}], chosen, rejected, None)
    assert pair is not None  # without a longest length every pair fits
    return Choice(pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]])


def build_tree(choice: Choice) -> Tree:
    ids = list(choice.prefix)
    parents = list(range(-1, len(ids) - 1))
    depth = list(range(len(ids)))
    children: dict[tuple[int, int], int] = {}
    paths = []
    for continuation in choice.continuations:
        place, path = len(choice.prefix) - 1, []
        for number, token in enumerate(continuation):
            path.append((place, token))
            if number + 1 < len(continuation):  # the last token is predicted, never read
                if (place, token) not in children:
                    children[place, token] = len(ids)
                    ids.append(token)
                    parents.append(place)
                    depth.append(depth[place] + 1)
                place = children[place, token]
        paths.append(path)
    return Tree(ids, parents, depth, paths)


def tree_mask(trees: Sequence[Tree]) -> Tensor:
    """(T, T) bool: what each token of a row may attend to, itself included."""
    total = sum(len(tree.ids) for tree in trees)
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for tree in trees:
        size = len(tree.ids)
        own = torch.zeros(size, size, dtype=torch.bool)
        prefix = next((i for i in range(size) if tree.parents[i] != i - 1), size)
        own[:prefix, :prefix] = torch.ones(prefix, prefix, dtype=torch.bool).tril_()
        for place in range(prefix, size):
            own[place] = own[tree.parents[place]]
            own[place, place] = True
        mask[start : start + size, start : start + size] = own
        start += size
    return mask


class Scorer:
    """Scores choices with one model; decides once, by a probe, how that model is asked.

    Args:
        tokens: in a row, at most, unless one question alone is longer.
    """

    def __init__(self, model: Any, tokens: int | None = None) -> None:
        self.model = model
        self.tokens = tokens or (GPU_TOKENS if model.device.type == "cuda" else CPU_TOKENS)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        config = model.config.get_text_config(decoder=True)
        limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self.window = min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=None)
        self.problem: str | None = None  # why trees are not used; None while they are
        self.probed = False

    def score(self, choices: Iterable[Choice]) -> Iterator[list[float]]:
        """The log-probability (natural, summed over its tokens) of each continuation, choice by choice, in order.

        Memory depends on the row, not on the number of choices.
        """
        for row in self._rows(choices):
            if not self.probed and (fitting := [choice for choice in row if self._fits(build_tree(choice))]):
                self._probe(fitting[:PROBES])
            yield from self._score_row(row)

    def _rows(self, choices: Iterable[Choice]) -> Iterator[list[Choice]]:
        row: list[Choice] = []
        length = 0
        for choice in choices:
            size = len(choice.prefix) + sum(map(len, choice.continuations))
            if self.problem is None:
                size = len(build_tree(choice).ids)
            if row and length + size > self.tokens:
                yield row
                row, length = [], 0
            row.append(choice)
            length += size
        if row:
            yield row

    def _score_row(self, row: list[Choice]) -> list[list[float]]:
        trees = [build_tree(choice) for choice in row]
        if self.problem or not all(map(self._fits, trees)):
            return self.score_plainly(row)
        return self._score_trees(trees)

    def _fits(self, tree: Tree) -> bool:
        """Whether a sliding window, which our mask does not have, would not hide anything from this question."""
        return self.window is None or max(tree.depth) < self.window

    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def _probe(self, choices: list[Choice]) -> None:
        """Compare trees with plain rows on real questions; what differs is scored by plain rows from here on."""
        self.probed = True
        try:
            found = self._score_trees([build_tree(choice) for choice in choices])
        except (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError) as error:
            self.problem = f"trees of continuations failed ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
            return
        expected = self.score_plainly(choices)
        exact = not hasattr(self.model, "hf_quantizer") and self._dtype() == torch.float32
        nats, share = TOLERANCE if exact else COARSE_TOLERANCE
        pairs = [(a, b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)]
        if not all(abs(a - b) <= nats + share * abs(b) for a, b in pairs):
            off = max(abs(a - b) for a, b in pairs)
            self.problem = f"trees of continuations move a log-probability by {off:.2g}"

    @torch.inference_mode()
    def _score_trees(self, trees: list[Tree]) -> list[list[float]]:
        device = self.model.device
        ids = torch.tensor([[token for tree in trees for token in tree.ids]], device=device)
        positions = torch.tensor([[place for tree in trees for place in tree.depth]], device=device)
        allowed = tree_mask(trees).to(device)[None, None]
        dtype = self._dtype()
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
        starts = [0]
        for tree in trees[:-1]:
            starts.append(starts[-1] + len(tree.ids))
        places = sorted({s + p for s, t in zip(starts, trees, strict=True) for path in t.paths for p, _ in path})
        index = {place: i for i, place in enumerate(places)}
        kept = torch.tensor(places, device=device)
        extra = {"logits_to_keep": kept} if self.keeps_logits else {}
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **extra
        ).logits[0]
        logits = logits if self.keeps_logits else logits[kept]
        steps = [
            (index[start + place], token)
            for start, tree in zip(starts, trees, strict=True)
            for path in tree.paths
            for place, token in path
        ]
        rows, tokens = torch.tensor(steps, device=device).T
        logits = logits.float()
        logps = (logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]).tolist()
        scores: list[list[float]] = []
        at = 0
        for tree in trees:
            scores.append([])
            for path in tree.paths:
                scores[-1].append(sum(logps[at : at + len(path)]))
                at += len(path)
        return scores

    @torch.inference_mode()
    def score_plainly(self, choices: Sequence[Choice]) -> list[list[float]]:
        """The same by a whole row for each continuation; rows of equal length share a call, so none is padded."""
        rows = [
            (i, j, choice.prefix + continuation, len(continuation))
            for i, choice in enumerate(choices)
            for j, continuation in enumerate(choice.continuations)
        ]
        scores = [[0.0] * len(choice.continuations) for choice in choices]
        by_length: dict[int, list[Any]] = {}
        for row in rows:
            by_length.setdefault(len(row[2]), []).append(row)
        for length, same in by_length.items():
            size = max(1, self.tokens // length)
            for at in range(0, len(same), size):
                batch = same[at : at + size]
                ids = torch.tensor([ids for _, _, ids, _ in batch], device=self.model.device)
                longest = max(tail for *_, tail in batch)
                extra = {"logits_to_keep": longest + 1} if self.keeps_logits else {}
                logits = self.model(input_ids=ids, use_cache=False, **extra).logits[:, -longest - 1 : -1].float()
                logps = logits.log_softmax(-1).gather(2, ids[:, -longest:, None])[..., 0]
                for (i, j, _, tail), values in zip(batch, logps.tolist(), strict=True):
                    scores[i][j] = sum(values[longest - tail :])
        return scores
