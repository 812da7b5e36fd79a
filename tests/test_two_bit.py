"""Two bits a weight: codes by hand, gradients against a plain layer, and a run from training to the merged model."""

import io
import json
import math
from contextlib import redirect_stdout

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import supervised_finetuning
from benchmarks.family_matrix import FAMILIES, write_model
from suwen import two_bit
from suwen.merging import merge_adapters
from suwen.models import load_base, load_causal_lm

torch.manual_seed(0)


def test_four_values_at_equal_distance_are_kept_exactly_in_two_and_a_half_bits():
    weight = torch.tensor([[-1.0, -0.5, 0.0, 0.5] * 32, [2.0, 4.0, 8.0, 6.0] * 32])
    packed, scale, zero = two_bit.quantize(weight)
    assert packed.shape == (4, 16) and packed.dtype == torch.uint8
    assert packed[0, 0].item() == 0 | 1 << 2 | 2 << 4 | 3 << 6
    assert packed[2, 0].item() == 0 | 1 << 2 | 3 << 4 | 2 << 6
    assert scale.flatten().tolist() == [0.5, 0.5, 2, 2] and zero.flatten().tolist() == [2, 2, -1, -1]
    assert torch.equal(two_bit.dequantize(packed, scale, zero).view_as(weight), weight)
    stored = 8 * (packed.numel() + scale.numel() * scale.element_size() + zero.numel() * zero.element_size())
    assert stored / weight.numel() == 2.5


@pytest.mark.parametrize("value", [0.0, 1.0, -0.03125])
def test_equal_weights_are_kept_and_no_division_by_zero(value):
    weight = torch.full((2, 64), value)
    assert torch.equal(two_bit.dequantize(*two_bit.quantize(weight)), weight)


def test_moving_the_zero_point_beats_plain_rounding_between_smallest_and_largest():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    groups = weight.reshape(-1, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    plain = ((groups - low) / (high - low) * 3).round() / 3 * (high - low) + low
    found = two_bit.dequantize(*two_bit.quantize(weight))
    assert (found - groups).abs().mean() < 0.99 * (plain - groups).abs().mean()


def test_the_layer_and_its_gradient_are_those_of_a_plain_layer_with_the_same_weights():
    source = torch.nn.Linear(96, 64)
    layer = two_bit.TwoBitLinear(source)
    plain = torch.nn.Linear(96, 64)
    plain.weight.data, plain.bias.data = layer.dense(), source.bias.data
    x = torch.randn(5, 96, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    with redirect_stdout(io.StringIO()):
        write_model(FAMILIES["llama"], folder)
    return str(folder)


@pytest.mark.training
def test_every_linear_layer_but_the_head_is_put_into_two_bits_and_back(base):
    original = AutoModelForCausalLM.from_pretrained(base)
    model = load_base(base, torch.float32, "2bit", device="cpu")
    names = {n for n, m in model.named_modules() if isinstance(m, two_bit.TwoBitLinear)}
    assert names == {n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    report = model.two_bit_report
    assert report.bits == 2.5 and report.left == 0 and 0.05 < report.error < 0.2
    assert report.loss_after is not None and abs(report.loss_after - report.loss_before) < 0.5
    ids = torch.arange(5, 25)[None]
    before = model(ids).logits
    plain = two_bit.dequantize_model(model)
    assert not any(isinstance(m, two_bit.TwoBitLinear) for m in plain.modules())
    torch.testing.assert_close(plain(ids).logits, before)


@pytest.mark.training
def test_an_adapter_learns_on_two_bits_goes_on_and_is_merged_as_it_was_trained(base, tmp_path, capsys):
    words = ["--use_peft", "True", "--quantization", "2bit", "--train_file_dir", "data/sft", "--max_length", "192"]
    words += ["--max_steps", "6", "--max_train_samples", "12", "--max_eval_samples", "2", "--num_proc", "1"]
    words += ["--gradient_accumulation_steps", "1", "--save_strategy", "no", "--report_to", "none", "--use_cpu"]
    words += ["--bf16", "False", "--learning_rate", "1e-2", "--disable_tqdm", "True", "--on_bad_rows", "skip"]
    words += ["--cache_dir", str(tmp_path / "cache")]

    def train(start: str, name: str) -> float:
        out = tmp_path / name
        supervised_finetuning.main([*words, "--model_name_or_path", start, "--output_dir", str(out)])
        said = capsys.readouterr().out
        assert "weights of linear layers at 2.50 bits each" in said and "loss on probe sentences" in said
        record = json.loads((out / "run.json").read_text())
        assert record["arguments"]["quantization"] == "2bit"
        return record["evaluation"]["eval_loss"]

    first = train(base, "first")
    assert train(str(tmp_path / "first"), "second") < first < math.log(len(AutoTokenizer.from_pretrained(base)))
    for merge_base in ("dequantized", "original"):
        out = str(tmp_path / merge_base)
        record = merge_adapters(None, [str(tmp_path / "second")], out, merge_base=merge_base, log=lambda line: None)
        assert record["base"]["training_quantization"] == "2bit" and record["base"]["merged_into"] == merge_base
    ids = torch.arange(5, 45)[None]
    trained = load_causal_lm(str(tmp_path / "second"), "float32", "2bit", "cpu").eval()(ids).logits
    merged = {name: load_causal_lm(str(tmp_path / name)).eval()(ids).logits for name in ("dequantized", "original")}
    torch.testing.assert_close(merged["dequantized"], trained, rtol=1e-4, atol=1e-4)
    assert (merged["original"] - trained).abs().mean() > 100 * (merged["dequantized"] - trained).abs().mean()


@pytest.mark.training
def test_two_bits_are_refused_without_an_adapter():
    with pytest.raises(ValueError, match="quantised weights cannot be trained, add --use_peft True"):
        supervised_finetuning.main(["--quantization", "2bit", "--train_file_dir", "data/sft"])
