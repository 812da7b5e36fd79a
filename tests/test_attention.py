"""Attention segment by segment: what each path gives is what single, unpacked rows give; logits and gradients."""

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from suwen import attention
from suwen.batches import pack_pairs, pack_rows, segments
from suwen.probe import on_device, random_pairs, random_rows
from suwen.rows import rows_of_pair

pytestmark = pytest.mark.training

VOCABULARY = 300
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "llama": lambda: tiny_model(tiny_tokenizer()),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)),
}


def inputs(batch):
    return {k: v for k, v in on_device(batch, torch.device("cpu")).items() if not k.startswith("score")}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_have_the_logits_and_gradients_of_single_rows(name, checkpointing):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = random_rows(VOCABULARY)
    expected = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    weighting = torch.randn_like(expected)
    (expected * weighting).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(attention.NAME)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = model(**inputs(pack_rows(rows)), use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (found * weighting).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_computed_once_serves_both_answers(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention.NAME)
    pairs = random_pairs(VOCABULARY)
    logits = model(**inputs(pack_pairs(pairs)), use_cache=False).logits[0]
    start = 0
    for pair in pairs:
        prompt, chosen = len(pair["prompt_ids"]), len(pair["chosen_ids"])
        better, worse = (model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows_of_pair(pair))
        torch.testing.assert_close(logits[start : start + prompt + chosen], better, atol=1e-5, rtol=1e-5)
        start += prompt + chosen
        rejected = logits[start : start + len(pair["rejected_ids"])]
        torch.testing.assert_close(rejected, worse[prompt:], atol=1e-5, rtol=1e-5)
        start += len(pair["rejected_ids"])


def test_whole_padded_and_cached_sequences_are_as_with_sdpa():
    model, plain = MODELS["mistral with a window"]().eval(), MODELS["mistral with a window"]().eval()
    plain.load_state_dict(model.state_dict())
    model.set_attn_implementation(attention.NAME)
    ids = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for options in ({}, {"attention_mask": mask}):
        kept = mask.bool() if options else torch.ones_like(mask, dtype=torch.bool)
        found, expected = (m(input_ids=ids, **options).logits[kept] for m in (model, plain))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    answers = [m.generate(ids[:1], max_new_tokens=8, do_sample=False) for m in (model, plain)]
    assert torch.equal(*answers)


def test_queries_are_aligned_with_the_end_of_their_keys():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, 4, generator=generator) for length in (3, 5, 5))
    found, _ = attention.varlen_attention(None, query, key, value, None, **segments([3], [5]))
    scores = query @ key.transpose(2, 3) / 2
    for position in range(3):
        seen = position + 3  # the last of three queries sees all five keys
        weights = scores[:, :, position, :seen].softmax(-1)
        expected = (weights[..., None] * value[:, :, :seen]).sum(2)
        torch.testing.assert_close(found[:, position], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("lengths", "key_lengths"), [([70, 9, 33], [70, 9, 33]), ([12, 30], [40, 61])])
def test_short_segments_in_bfloat16_are_as_close_to_the_exact_result_as_the_kernel(
    lengths, key_lengths, window, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, sum(lengths)), (2, sum(key_lengths)), (2, sum(key_lengths)))  # two query heads to a key head
    given = [torch.randn(1, heads, length, 16, generator=generator).bfloat16() for heads, length in shapes]
    slope = torch.randn(1, sum(lengths), 4, 16, generator=generator).bfloat16()

    def results(dtype):
        tensors = [tensor.to(dtype, copy=True).requires_grad_() for tensor in given]
        places = segments(lengths, key_lengths)
        found, _ = attention.varlen_attention(None, *tensors, None, sliding_window=window, **places)
        found.backward(slope.to(dtype))
        return [found.detach(), *(tensor.grad for tensor in tensors)]

    def distances(found):
        return [((one - two).norm() / two.norm()).item() for one, two in zip(found, exact, strict=True)]

    exact = results(torch.float64)
    short = distances(results(torch.bfloat16))
    monkeypatch.setattr(attention, "SHORT", 0)
    kernel = distances(results(torch.bfloat16))
    assert short != kernel  # the one was taken, and then the other
    assert max(short) < 2 * max(kernel) < 2 * 2**-8  # the precision of bfloat16


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_under_autocast_queries_and_keys_of_float32_weights_come_to_the_kernel_in_16_bit(name, monkeypatch):
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention.NAME)
    seen = []
    original = attention.short_attention

    def spy(query, key, value, *args):
        seen.append({query.dtype, key.dtype, value.dtype})
        return original(query, key, value, *args)

    monkeypatch.setattr(attention, "short_attention", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs(pack_rows(random_rows(VOCABULARY))), use_cache=False)
    assert seen == [{torch.bfloat16}] * 3 * 2  # rows, layers


def test_layers_do_not_ask_again_where_segments_lie():
    places = segments([5, 3], [7, 9])
    lengths = attention.segment_lengths(places["cu_seq_lens_k"])
    assert lengths == [7, 9] and attention.segment_lengths(places["cu_seq_lens_q"]) == [5, 3]
    assert attention.segment_lengths(places["cu_seq_lens_k"]) is lengths
    bounds = attention.group_bounds(places["cu_seq_lens_k"], 4, 0)
    assert bounds.tolist() == [0, 4, 7, 11, 15, 16]
    assert attention.group_bounds(places["cu_seq_lens_k"], 4, 0) is bounds


def test_no_mask_is_built_for_packed_rows(monkeypatch):
    model = MODELS["llama"]()
    model.set_attn_implementation(attention.NAME)
    seen = []
    original = attention.varlen_attention

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return original(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, spy)
    model(**inputs(pack_rows(random_rows(VOCABULARY))), use_cache=False)
    assert seen == [None, None]


def test_what_the_kernel_lacks_is_refused_not_left_out():
    config = Gemma2Config(**SMALL, head_dim=8)
    model = Gemma2ForCausalLM(config)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(NotImplementedError, match="soft capping"):
        model(**inputs(pack_rows(random_rows(VOCABULARY))), use_cache=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "mistral with a window", "qwen3"])
def test_the_kernel_gives_what_the_segments_give(name, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().to("cuda", torch.bfloat16)
    model.set_attn_implementation(attention.NAME)
    for batch in (pack_rows(random_rows(VOCABULARY)), pack_pairs(random_pairs(VOCABULARY))):
        batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs(batch).items()}
        found = []
        for kernel in (True, False):
            monkeypatch.setattr(attention, "has_kernel", lambda query, kernel=kernel: kernel)
            model.zero_grad()
            logits = model(**batch, use_cache=False).logits.float()
            logits.square().mean().backward()
            found.append((logits, model.get_input_embeddings().weight.grad.float()))
        for one, other in zip(*found, strict=True):
            assert (one - other).abs().max() < 0.05 * other.abs().max()


def test_the_attention_of_the_training_is_not_written_into_the_model(tmp_path):
    model = MODELS["llama"]()
    model.set_attn_implementation(attention.NAME)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
