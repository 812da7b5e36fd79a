"""Packing: nothing lost, nothing too long, few packs, the same for the same rows, balanced over ranks."""

import numpy as np
import pytest
from datasets import Dataset

from suwen.batches import pack_rows, pad_rows
from suwen.packing import BalancedSampler, Packs, pack_best_fit


def real_lengths(count: int, seed: int = 0, longest: int = 1024) -> np.ndarray:
    """Many short answers and a long tail."""
    return np.minimum(np.random.default_rng(seed).lognormal(4.8, 0.9, count).astype(int) + 8, longest)


@pytest.mark.parametrize("count", [0, 1, 2, 999])
def test_every_row_is_in_one_pack_and_no_pack_is_too_long(count):
    lengths = real_lengths(count)
    packs = pack_best_fit(lengths, 1024)
    assert sorted(np.concatenate([*packs, np.array([], dtype=int)]).tolist()) == list(range(count))
    assert all(lengths[pack].sum() <= 1024 for pack in packs)


def test_best_fit_by_hand():
    # 6 goes first, then 5; the 4 fits the 6 exactly, the 3s share the space beside the 5
    packs = pack_best_fit([3, 6, 4, 5, 2], 10)
    assert [pack.tolist() for pack in packs] == [[0, 3, 4], [1, 2]]


def test_real_lengths_fill_the_packs():
    lengths = real_lengths(20_000)
    packs = pack_best_fit(lengths, 1024)
    assert lengths.sum() / (len(packs) * 1024) > 0.995
    again = pack_best_fit(lengths, 1024)
    assert all(np.array_equal(a, b) for a, b in zip(packs, again, strict=True))


def test_short_rows_of_one_length_do_not_share_packs_with_their_like():
    lengths = np.repeat([40, 50, 60, 70], 500)  # as files are: one kind of row behind another
    packs = pack_best_fit(lengths, 2048)
    assert min(len(set(lengths[pack])) for pack in packs) == 4
    apart = np.array([np.diff(pack).mean() for pack in packs])  # neighbours in the file would be 1 apart
    assert apart.min() > 10


def test_a_row_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="rows of 5 to 11 tokens do not fit packs of 10"):
        pack_best_fit([5, 11], 10)


def test_a_pack_is_the_list_of_its_rows():
    rows = Dataset.from_list([{"input_ids": [i] * (i + 1), "labels": [i] * (i + 1)} for i in range(4)])
    packs = Packs(rows, [np.array([0, 2]), np.array([1, 3])], np.array([1, 2, 3, 4]))
    assert packs[0] == [{"input_ids": [0], "labels": [0]}, {"input_ids": [2, 2, 2], "labels": [2, 2, 2]}]
    assert len(packs) == 2 and packs.tokens == 10


def test_packed_and_padded_rows_score_the_same_labels():
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [9, 10, 11], "labels": [9, 10, -100]},
    ]
    packed, padded = pack_rows(rows), pad_rows(rows, 0)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 4, 7]
    # A row's first token has nothing before it that could predict it
    assert packed["score_at"].tolist() == [1, 2, 4] and packed["score_labels"].tolist() == [7, 8, 10]
    assert padded["score_at"].tolist() == [1, 2, 4] and padded["score_labels"].tolist() == [7, 8, 10]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_rows_without_labels_are_trained_as_a_whole():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    labelled = [{**row, "labels": row["input_ids"]} for row in rows]
    for bare, full in ((pack_rows(rows), pack_rows(labelled)), (pad_rows(rows, 0), pad_rows(labelled, 0))):
        assert bare["score_labels"].tolist() == full["score_labels"].tolist() == [6, 7, 9]
        assert bare["score_at"].tolist() == full["score_at"].tolist()


def test_ranks_compute_packs_of_about_the_same_cost():
    costs = real_lengths(1000).astype(float)
    sampler = BalancedSampler(costs, group=8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(1000))
    spread = [costs[order[at : at + 8]].max() / costs[order[at : at + 8]].min() for at in range(0, 1000, 8)]
    shuffled = np.random.default_rng(0).permutation(1000)
    by_chance = [costs[shuffled[at : at + 8]].max() / costs[shuffled[at : at + 8]].min() for at in range(0, 1000, 8)]
    assert np.median(spread) < 1.1 < 3 < np.median(by_chance)


def test_each_epoch_has_an_order_of_its_own_and_can_be_repeated():
    sampler = BalancedSampler(np.arange(50.0), group=1, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second and sorted(second) == list(range(50))
