"""ChatGLM-6B: its mask, its positions, its collator."""

import pytest
import torch

from suwen.architectures.chatglm import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    PrefixCollator,
    prefix_mask,
    prefix_positions,
)

pytestmark = pytest.mark.training

CONFIG = ChatGLMConfig(
    vocab_size=64, hidden_size=32, inner_hidden_size=48, num_hidden_layers=2, num_attention_heads=4, bos_token_id=61,
    eos_token_id=62, gmask_token_id=60, mask_token_id=59, pad_token_id=3,
)  # fmt: skip
ROW = [10, 11, 12, 60, 61, 20, 21, 62]  # three words, [gMASK], <sop>, two words, <eop>


def test_positions_count_the_context_and_then_stay_at_gmask_while_blocks_count_the_answer():
    ids = torch.tensor([ROW, [3, 3, *ROW[:6]]])
    real = torch.tensor([[True] * 8, [False] * 2 + [True] * 6])
    found = prefix_positions(ids, real, CONFIG)
    assert found[0].tolist() == [[0, 1, 2, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4]]
    assert found[1].tolist() == [[0, 0, 0, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0, 1, 2]]


def test_the_context_sees_itself_in_both_directions_and_the_answer_what_was_before():
    ids = torch.tensor([ROW])
    seen = prefix_mask(ids, torch.ones_like(ids, dtype=torch.bool), CONFIG)[0, 0]
    assert seen[:, :4].all()
    assert torch.equal(seen[4:, 4:], torch.ones(4, 4, dtype=torch.bool).tril()) and not seen[:4, 4:].any()


def test_a_document_without_sop_sees_nothing_that_follows():
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(CONFIG).eval()
    one, other = torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[10, 11, 12, 20, 21]])
    torch.testing.assert_close(model(one).logits[:, :3], model(other).logits[:, :3])
    assert (model(one).logits[:, 3:] - model(other).logits[:, 3:]).abs().max() > 1e-3


def test_padding_on_either_side_changes_no_logit():
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(CONFIG).eval()
    alone = model(torch.tensor([ROW])).logits
    ids = torch.tensor([[3, 3, *ROW], [*ROW, 3, 3]])
    mask = torch.tensor([[0, 0] + [1] * 8, [1] * 8 + [0, 0]])
    both = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(both[:1, 2:], alone)
    torch.testing.assert_close(both[1:, :8], alone)


def test_the_collator_pads_and_refuses_what_would_teach_copying():
    collate = PrefixCollator(CONFIG)
    answer = {"input_ids": ROW, "labels": [-100] * 5 + ROW[5:]}
    document = {"input_ids": [10, 11], "labels": [10, 11]}
    batch = collate([answer, document])
    assert batch["attention_mask"].sum(1).tolist() == [8, 2]
    assert batch["labels"][1].tolist() == [10, 11] + [-100] * 6
    with pytest.raises(ValueError, match="row 0 of the batch has labels before <sop>"):
        collate([{"input_ids": ROW, "labels": ROW}])
    with pytest.raises(ValueError, match="row 1 of the batch has 2 <sop>, expected one"):
        collate([answer, {"input_ids": ROW + ROW, "labels": [-100] * 16}])


def test_embeddings_without_ids_and_a_cache_without_positions_are_refused():
    model = ChatGLMForConditionalGeneration(CONFIG).eval()
    with pytest.raises(ValueError, match="expected ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    cache = model(torch.tensor([ROW])).past_key_values
    with pytest.raises(ValueError, match="prepare_inputs_for_generation"):
        model(torch.tensor([[20]]), past_key_values=cache)


def test_later_chatglms_are_not_taken_for_the_first():
    with pytest.raises(ValueError, match="convert it to Glm"):
        ChatGLMConfig(padded_vocab_size=65024)
