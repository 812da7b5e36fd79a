"""The head without logits: values and gradients are those of log_softmax over all of them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from suwen import head
from suwen.batches import pack_rows
from suwen.probe import random_rows

pytestmark = pytest.mark.training

VOCABULARY = 300
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "llama": lambda: tiny_model(tiny_tokenizer()),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
}


def plain_logps(model, batch):
    given = {k: batch[k] for k in ("input_ids", "position_ids")}
    logits = model(**given, use_cache=False).logits.flatten(0, 1)[batch["score_at"]].float()
    logps = logits.log_softmax(1).gather(1, batch["score_labels"][:, None])[:, 0]
    return logps, logits.argmax(1) == batch["score_labels"]


@pytest.mark.parametrize("chunk", [2**23, 7 * VOCABULARY])
@pytest.mark.parametrize("trained", ["all", "all but the head", "lora", "lora on the head"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_full_logits(name, trained, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    base = model = MODELS[name]()
    if trained == "all but the head":
        base.get_output_embeddings().weight.requires_grad_(False)
    elif trained.startswith("lora"):
        targets = ["q_proj", "lm_head"] if trained == "lora on the head" else ["q_proj"]
        model = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False))
    head.add_scoring_head(base)
    batch = pack_rows(random_rows(VOCABULARY)[:1])
    results = []
    for full in (True, False):
        model.zero_grad()
        if full:
            logps, correct = plain_logps(model, batch)
        else:
            scored = model(**{k: batch[k] for k in ("input_ids", "position_ids", "score_at", "score_labels")})
            logps, correct = scored.logps, scored.correct
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logps.detach(), correct, grads))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    assert torch.equal(results[1][1], results[0][1])
    assert results[0][2].keys() == results[1][2].keys() and results[0][2]
    for name, gradient in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], gradient, atol=1e-5, rtol=1e-4)


def test_no_tensor_of_positions_times_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple) else (result,):
                if isinstance(item, torch.Tensor) and item.shape[-1:] == (VOCABULARY,):
                    largest = max(largest, item.numel() // VOCABULARY)
            return result

    hidden = torch.randn(100, 5, requires_grad=True)
    weight = torch.randn(VOCABULARY, 5, requires_grad=True)
    labels = torch.randint(VOCABULARY, (100,))
    with Watch():
        logps, _ = head.TokenLogps.apply(hidden, weight, None, labels, 1.0, None, torch.float32)
        logps.sum().backward()
    assert largest == 8


def test_a_row_without_trained_tokens_is_no_accident():
    model = tiny_model(tiny_tokenizer())
    head.add_scoring_head(model)
    nothing = torch.zeros(0, dtype=torch.long)
    scored = model(input_ids=torch.tensor([[5, 6, 7]]), score_at=nothing, score_labels=nothing)
    scored.logps.sum().backward()
    assert scored.logps.shape == (0,)
