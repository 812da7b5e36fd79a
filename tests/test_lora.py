"""LoRA in one step: what it computes is what PEFT computes, and its dropout drops what it says."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from suwen import lora
from suwen.models import without_dropout

pytestmark = pytest.mark.training
IDS = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))


def with_adapter(base, **settings):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(base, config).train()


def base_model(kind, folder):
    if kind == "plain":
        return tiny_model(tiny_tokenizer())
    pytest.importorskip("bitsandbytes")
    tiny_model(tiny_tokenizer()).save_pretrained(folder)
    flags = {"load_in_8bit": True} if kind == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**flags), device_map={"": "cpu"}
    )


def results(model, autocast):
    """Logits, and gradients of what is trained and of the embedded input."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(inputs_embeds=embedded).logits.float()
    logits.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in found.values())
    return {"logits": logits.detach(), "input": embedded.grad, **found}


def distance(one, two):
    """The largest relative distance of two sets of results."""
    return max(((one[n] - two[n]).norm() / two[n].norm().clamp(min=1e-12)).item() for n in two)


@pytest.mark.parametrize("kind", ["plain", "8bit", "4bit"])
@pytest.mark.parametrize("autocast", [False, True])
def test_results_and_gradients_are_those_of_peft(kind, autocast, tmp_path):
    model = with_adapter(base_model(kind, tmp_path))
    expected = results(model, autocast)
    lora.fuse_lora(model)
    found = results(model, autocast)
    assert found.keys() == expected.keys()
    if autocast:  # rounded otherwise, no further from the truth than PEFT
        exact = results(model, autocast=False)
        assert distance(found, exact) < 1.5 * distance(expected, exact)
    else:
        assert distance(found, expected) < 1e-5


def test_switched_off_merged_and_mixed_adapters_take_the_way_of_peft():
    model = with_adapter(tiny_model(tiny_tokenizer())).eval()
    plain = copy.deepcopy(model)
    lora.fuse_lora(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    plain.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    plain.load_state_dict(model.state_dict())

    def both(change=lambda model: None, **given):
        for one in (model, plain):
            change(one)
        with torch.no_grad():
            torch.testing.assert_close(*(one(IDS, **given).logits for one in (model, plain)), atol=1e-5, rtol=1e-5)

    both()
    both(adapter_names=["default", "other"])
    both(lambda one: one.base_model.set_adapter(["default", "other"]))
    both(lambda one: one.base_model.set_adapter("other"))
    with model.disable_adapter(), plain.disable_adapter():
        both()
    both(lambda one: one.merge_adapter())


def test_a_variant_is_left_to_peft():
    model = with_adapter(tiny_model(tiny_tokenizer()), use_dora=True)
    expected = results(model, autocast=False)
    lora.fuse_lora(model)
    assert distance(results(model, autocast=False), expected) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [1e-6, 0.05, 0.2, 0.3, 0.999])
def test_dropout_drops_its_share_anew_each_time(p, dtype):
    def masks():
        drawn = [lora.draw(x, p) for _ in range(2)]
        return [lora.drop_(x.clone(), dropped) for dropped, _ in drawn], [chance for _, chance in drawn]

    torch.manual_seed(0)
    x = torch.ones(331, 1001, dtype=dtype)
    found, chances = masks()
    assert found[0].dtype == dtype and set(found[0].unique().tolist()) <= {0.0, 1.0}
    assert chances == pytest.approx([1 - p] * 2, abs=1 / x.numel())
    spread = 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1 / x.numel()
    assert [one.double().mean().item() for one in found] == pytest.approx(chances, abs=spread)
    both = (found[0].double() * found[1].double()).mean().item()  # of independent masks
    assert both == pytest.approx((1 - p) ** 2, abs=spread)
    rows = found[0].double().mean(1)  # no part of the tensor is dropped more than another
    assert (rows - chances[0]).abs().max() < 6 * (p * (1 - p) / x.shape[1]) ** 0.5 + 2 / x.shape[1]
    torch.manual_seed(0)
    assert torch.equal(masks()[0][0], found[0])


@pytest.mark.parametrize("by_place", [False, True])
def test_results_with_dropout_are_unbiased_and_have_the_gradients_of_their_mask(by_place, monkeypatch):
    if by_place:
        monkeypatch.setattr(lora, "MOST_BY_PLACE", 0.9)
        monkeypatch.setattr(lora, "FEWEST_BY_PLACE", 2)
    torch.manual_seed(0)
    x, a, b = torch.randn(5, 8, dtype=torch.double), torch.randn(3, 8).double(), torch.randn(6, 3).double()
    given = [tensor.requires_grad_() for tensor in (torch.zeros(5, 6, dtype=torch.double), x, a, b)]

    def add(result, x, a, b, p=0.3):
        rows, dropped, scale = lora.Dropout()(x, x.dtype, p)
        return lora.AddLora.apply(result, x, rows, dropped, a, b, 0.5 * scale)

    def with_one_mask(*tensors):
        torch.manual_seed(3)
        return add(*tensors)

    assert torch.autograd.gradcheck(with_one_mask, given)
    torch.testing.assert_close(add(*given, 1e-6), add(*given, 0.0), atol=0, rtol=2e-6)  # next to none
    with torch.no_grad():
        mean = torch.stack([add(*given) for _ in range(20_000)]).mean(0)
        torch.testing.assert_close(mean, 0.5 * x @ a.t() @ b.t(), atol=0.15, rtol=0)


def test_layers_that_read_one_tensor_share_its_mask_and_no_other():
    dropout, x = lora.Dropout(), torch.randn(4, 6)
    rows, kept, _ = dropout(x, x.dtype, 0.5)
    assert dropout(x, x.dtype, 0.5)[0] is rows
    assert torch.equal(rows, x * kept)
    assert dropout(x, torch.bfloat16, 0.5)[0].dtype == torch.bfloat16
    assert dropout(x, x.dtype, 0.0)[1] is None
    dropout(x, x.dtype, 0.5)
    x.add_(1)  # another tensor now
    rows, kept, _ = dropout(x, x.dtype, 0.5)
    assert torch.equal(rows, x * kept)
    other = x.clone()
    assert dropout(other, x.dtype, 0.5)[0] is not rows
    del other
    assert not dropout.last  # nothing is held longer than its tensor


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_meet_the_same_masks(reentrant):
    model = with_adapter(tiny_model(tiny_tokenizer()), lora_dropout=0.5)
    lora.fuse_lora(model)
    torch.manual_seed(5)
    expected = results(model, autocast=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(5)
    assert distance(results(model, autocast=False), expected) < 1e-6


def test_no_dropout_outside_of_training_or_once_it_is_switched_off():
    model = with_adapter(tiny_model(tiny_tokenizer()), lora_dropout=0.5)
    lora.fuse_lora(model)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, model(IDS).logits)
        expected = model.eval()(IDS).logits
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
        assert not torch.equal(model.train()(IDS).logits, expected)
    with torch.no_grad():
        without_dropout(model)
        assert torch.equal(model.train()(IDS).logits, expected)
