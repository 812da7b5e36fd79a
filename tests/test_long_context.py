"""Longer texts: stretched positions by their formulas, shifted attention against masks, noise of published size."""

import json
import math

import pytest
import torch
from test_stages import SCRIPTS, arguments, base, run_stage  # noqa: F401  (base is a fixture)
from tiny import tiny_model, tiny_tokenizer
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from suwen import attention
from suwen.architectures import (
    BaichuanConfig,
    BaichuanForCausalLM,
    ChatGLMConfig,
    ChatGLMForConditionalGeneration,
)
from suwen.batches import pack_pairs, pack_rows, pad_rows, segments
from suwen.generation import model_window, window_of
from suwen.models import scale_rope
from suwen.neftune import EmbeddingNoise, row_lengths
from suwen.probe import random_pairs

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

# Stretched positions


def frequencies(config) -> torch.Tensor:
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config)
    return model.model.rotary_emb.inv_freq


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(**SMALL | {"hidden_size": 128}, max_position_embeddings=64, **changes)


def stretched(kind: str, length: int) -> LlamaConfig:
    config = llama()
    scale_rope(config, kind, length)
    return config


def test_linear_scaling_divides_all_frequencies_by_the_factor():
    torch.testing.assert_close(frequencies(stretched("linear", 256)), frequencies(llama()) / 4)
    assert stretched("linear", 250).rope_parameters["factor"] == 4  # the next whole one


def test_llama3_scaling_leaves_short_waves_and_divides_long_ones():
    before, after = frequencies(llama()), frequencies(stretched("llama3", 256))
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        wavelength = 2 * math.pi / old
        share = min(1.0, max(0.0, (64 / wavelength - 1) / (4 - 1)))  # 1 below a wave of 64/4, 0 above one of 64
        assert new == pytest.approx(share * old + (1 - share) * old / 4, rel=1e-5)
    assert len({round(ratio, 4) for ratio in (before / after).tolist()}) >= 3


def test_yarn_keeps_the_fastest_and_divides_the_slowest_frequency():
    before, after = frequencies(llama()), frequencies(stretched("yarn", 256))
    assert after[0] == before[0] and after[-1] == pytest.approx(before[-1].item() / 4)
    assert torch.all(before / after <= 4.001) and torch.all((before / after).diff() >= -1e-4)


def test_dynamic_scaling_acts_beyond_the_models_own_window_alone():
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(llama()).eval()
    dynamic = AutoModelForCausalLM.from_config(stretched("dynamic", 128)).eval()
    dynamic.load_state_dict(plain.state_dict())
    assert dynamic.config.max_position_embeddings == 64
    short, long = (torch.arange(length)[None] % 300 for length in (64, 100))
    torch.testing.assert_close(dynamic(short).logits, plain(short).logits)
    assert (dynamic(long).logits - plain(long).logits).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_stretched_model_is_served_and_trained_on_over_its_new_length(kind):
    config = stretched(kind, 128)
    assert window_of(config) == 128
    assert model_window(AutoModelForCausalLM.from_config(config)) == 128


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_every_scaling_keeps_what_the_model_knows_and_comes_back_from_the_disk(kind, tmp_path):
    config = StableLmConfig(**SMALL | {"hidden_size": 128}, max_position_embeddings=64)
    theta, partial = config.rope_parameters["rope_theta"], config.rope_parameters["partial_rotary_factor"]
    scale_rope(config, kind, 128)
    StableLmForCausalLM(config).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert loaded.rope_parameters["rope_type"] == kind and loaded.rope_parameters["factor"] == 2
    assert (loaded.rope_parameters["rope_theta"], loaded.rope_parameters["partial_rotary_factor"]) == (theta, partial)
    if kind in ("yarn", "llama3"):
        assert loaded.rope_parameters["original_max_position_embeddings"] == 64


def unstretchable() -> list[PreTrainedModel]:
    """ALiBi, ALiBi in a class of our own, and positions that turn in two dimensions."""
    sizes = {"hidden_size": 32, "vocab_size": 1024}
    old = sizes | {"num_hidden_layers": 1, "num_attention_heads": 4}
    return [
        BloomForCausalLM(BloomConfig(**sizes, n_layer=1, n_head=4)),
        BaichuanForCausalLM(BaichuanConfig(**old, intermediate_size=48)),
        ChatGLMForConditionalGeneration(
            ChatGLMConfig(**old, inner_hidden_size=48, bos_token_id=1020, gmask_token_id=1021, mask_token_id=1022)
        ),
    ]


def test_scaling_is_refused_without_rotary_positions_twice_and_for_nothing():
    for model in unstretchable():
        kind = model.config.model_type
        with pytest.raises(ValueError, match=f"--rope_scaling: model type '{kind}' has no rotary positions"):
            scale_rope(model.config, "linear", 4096)
    with pytest.raises(ValueError, match="--rope_scaling yarn: the model's positions are stretched already .linear."):
        scale_rope(stretched("linear", 128), "yarn", 256)
    with pytest.raises(ValueError, match="--max_length 64 already fits the model's window of 64"):
        scale_rope(llama(), "linear", 64)


@pytest.mark.training
def test_a_stage_stretches_by_medicalgpts_names_and_saves_it(base, tmp_path):  # noqa: F811
    words = arguments(
        "pt", base, tmp_path, "--rope_scaling", "llama3", "--model_max_length", "1024", "--max_steps", "1"
    )
    at = words.index("--max_length")
    del words[at : at + 2]
    SCRIPTS["pt"].main(words)
    config = json.loads((tmp_path / "pt" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "llama3" and config["max_position_embeddings"] == 1024


# Shifted sparse attention


def allowed(lengths: list[int], group: int, shift: int) -> torch.Tensor:
    """(T, T) of True where a token may look: own text, own group, not ahead; written down token by token."""
    rows = [(text, (at - shift) // group) for text, length in enumerate(lengths) for at in range(length)]
    return torch.tensor([[i >= j and rows[i] == rows[j] for j in range(len(rows))] for i in range(len(rows))])


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_shifted_attention_is_attention_under_the_mask_of_each_half_of_the_heads(key_heads):
    torch.manual_seed(0)
    lengths, group = [21, 3, 10], 8
    query = torch.randn(1, 4, 34, 8, requires_grad=True)
    key, value = (torch.randn(1, key_heads, 34, 8, requires_grad=True) for _ in range(2))
    module = torch.nn.Module().train()
    found, _ = attention.shifted_attention(module, query, key, value, None, group, **segments(lengths))
    full = [x.repeat_interleave(4 // key_heads, dim=1) for x in (key, value)]
    mask = torch.stack([allowed(lengths, group, shift) for shift in (0, 0, group // 2, group // 2)])
    expected = scaled_dot_product_attention(query, *full, attn_mask=mask[None]).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weighting = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weighting).sum(), (query, key, value), retain_graph=True),
        torch.autograd.grad((expected * weighting).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def rows(*lengths: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def hidden(model, batch) -> torch.Tensor:
    names = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return model(**{name: batch[name] for name in names}, use_cache=False).logits[0]


@pytest.mark.training
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_texts_are_trained_as_alone_reach_half_a_group_further_a_layer_and_are_evaluated_in_full(checkpointing):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8))
    full = model.eval()(torch.tensor([rows(30)[0]["input_ids"]])).logits[0]
    model.set_attn_implementation(attention.register_shifted(8))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(hidden(model, pack_rows(rows(30))), full, atol=1e-5, rtol=1e-5)  # evaluation
    model.train()
    texts = rows(30, 13, 22)
    alone = torch.cat([hidden(model, pack_rows([text])) for text in texts])
    torch.testing.assert_close(hidden(model, pack_rows(texts)), alone, atol=1e-5, rtol=1e-5)
    assert (alone[:30] - full).abs().max() > 1e-2  # training is another attention
    # token 17 sees its groups [16, 24) and [12, 20); through the layer below from 12 also [8, 16): but never token 7
    embeddings = model.get_input_embeddings()(torch.tensor([texts[0]["input_ids"]])).detach().requires_grad_()
    batch = {k: v for k, v in pack_rows(texts[:1]).items() if k.startswith(("cu_seq", "max_length", "position"))}
    model(inputs_embeds=embeddings, use_cache=False, **batch).logits[0, 17].sum().backward()
    reached = embeddings.grad[0].abs().sum(1) > 0
    assert reached.tolist() == [8 <= at <= 17 for at in range(30)]


def test_shifted_attention_trains_neither_padded_rows_nor_pairs():
    model = tiny_model(tiny_tokenizer()).train()
    model.set_attn_implementation(attention.register_shifted(8))
    batch = pad_rows(rows(12, 9), 0)
    with pytest.raises(NotImplementedError, match="packed rows alone"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    pairs = {k: v for k, v in pack_pairs(random_pairs(300)).items() if k not in ("owners", "score_at", "score_labels")}
    with pytest.raises(NotImplementedError, match="neither padded rows nor pairs"):
        model(**pairs, use_cache=False)


@pytest.mark.training
def test_a_stage_trains_with_shifted_attention_and_refuses_where_it_cannot(base, tmp_path, capsys):  # noqa: F811
    losses = []
    for flags in ([], ["--shift_attn", "True"]):
        (folder := tmp_path / str(len(flags))).mkdir()
        record = run_stage(
            "pt", base, folder, "--max_steps", "1", "--learning_rate", "0", "--warmup_steps", "0", *flags
        )
        losses.append((record["training"]["loss"], record["evaluation"]["eval_loss"]))
    assert "shifted sparse attention in training, in groups of 32 tokens" in capsys.readouterr().out
    (plain, evaluated), (shifted, evaluated_too) = losses
    assert shifted != plain and evaluated_too == pytest.approx(evaluated, rel=1e-6)
    with pytest.raises(ValueError, match="--shift_attn: for pretraining and SFT alone"):
        SCRIPTS["dpo"].main(arguments("dpo", base, tmp_path, "--shift_attn"))
    with pytest.raises(ValueError, match="--shift_attn and --attn_implementation: give one"):
        SCRIPTS["pt"].main(arguments("pt", base, tmp_path, "--shift_attn", "--attn_implementation", "eager"))
    for model in unstretchable():
        kind = model.config.model_type
        for part in (model, tiny_tokenizer()):
            part.save_pretrained(tmp_path / kind)
        with pytest.raises(
            ValueError, match=f"--shift_attn: model type '{kind}' cannot have it .its attention cannot be replaced"
        ):
            SCRIPTS["pt"].main(arguments("pt", str(tmp_path / kind), tmp_path, "--shift_attn"))


# Noise on the embeddings


def test_each_row_gets_noise_for_its_own_length_in_training_alone():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(10, 400)
    noise = EmbeddingNoise(embedding, alpha=5.0)
    ids = torch.arange(100)[None] % 10
    clean = torch.nn.functional.embedding(ids, embedding.weight)
    noise.rows({"input_ids": ids, **segments([64, 36])})
    added = (embedding(ids) - clean)[0].detach()
    for part, length in ((added[:64], 64), (added[64:], 36)):
        largest = 5 / math.sqrt(length * 400)
        assert part.abs().max() <= largest * 1.001 and part.abs().max() > 0.99 * largest
        assert part.std().item() == pytest.approx(largest / math.sqrt(3), rel=0.02)  # of a uniform distribution
    embedding.eval()
    assert torch.equal(embedding(ids), clean)


def test_lengths_of_rows_are_known_packed_padded_and_in_pairs():
    texts = rows(3, 5)
    assert row_lengths(pack_rows(texts)).tolist() == [[3] * 3 + [5] * 5]
    padded = row_lengths(pad_rows(texts, 0))
    assert padded.tolist() == [[3] * 5, [5] * 5]
    pair = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
    assert row_lengths(pack_pairs([pair])).tolist() == [[5] * 5 + [4]]


@pytest.mark.training
def test_the_noise_of_a_packed_run_is_that_of_the_rows_and_the_librarys_is_off(base, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    add = EmbeddingNoise._add

    def watch(self, module, inputs, output):
        found = add(self, module, inputs, output)
        if module.training:
            seen.append(((found - output)[0].detach().abs().amax(1), self.lengths[0]))
        return found

    monkeypatch.setattr(EmbeddingNoise, "_add", watch)
    run_stage("sft", base, tmp_path, "--max_steps", "1", "--neftune_noise_alpha", "15")
    assert seen
    for largest, lengths in seen:
        limits = 15 / (lengths * 32).sqrt()
        assert torch.all(largest <= limits * 1.001) and torch.all(largest > 0.5 * limits)
