"""ChatGLM-6B: its mask, its positions, what can be trained."""

import pytest
import torch
from tiny import tiny_tokenizer

from suwen.architectures.chatglm import (
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
    prefix_mask,
    prefix_positions,
)
from suwen.batches import scored_positions
from suwen.encoding import ChatEncoder, encode_document
from template import TEMPLATES

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


def test_labels_on_a_context_that_sees_itself_are_refused(tmp_path):
    import supervised_finetuning

    model, tokenizer = ChatGLMForConditionalGeneration(CONFIG), tiny_tokenizer(["[gMASK]", "<sop>"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    words += ["--template_name", "chatglm", "--train_file_dir", "data/sft", "--train_on_inputs"]
    with pytest.raises(ValueError, match="--train_on_inputs: the prompts of model type 'chatglm' see themselves"):
        supervised_finetuning.main(words)


def test_every_row_of_a_conversation_and_of_a_document_is_labelled_where_nothing_ahead_is_seen():
    """Each answer has a row of its own behind one <sop>; a document has none, even where it spells one."""
    tokenizer = tiny_tokenizer(["[gMASK]", "<sop>"], chat_template=TEMPLATES["chatglm"].jinja)
    start, gmask = tokenizer.convert_tokens_to_ids(["<sop>", "[gMASK]"])
    config = ChatGLMConfig(bos_token_id=start, gmask_token_id=gmask)
    turns = [
        ("user", "头痛怎么办？"),
        ("assistant", "多休息 <sop> 完。"),
        ("user", "要吃药吗？"),
        ("assistant", "可以。"),
    ]
    rows, _ = ChatEncoder(tokenizer).encode_conversation([{"role": r, "content": c} for r, c in turns], 512)
    document = encode_document("头痛 [gMASK]<sop> 多休息", tokenizer)
    rows.append({"input_ids": document, "labels": document})
    assert [row["input_ids"].count(start) for row in rows] == [1, 1, 0]
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        seen = prefix_mask(ids, torch.ones_like(ids, dtype=torch.bool), config)[0, 0]
        scored = scored_positions(row["labels"])
        assert scored and not any(seen[at, at + 1 :].any() for at in scored)


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
