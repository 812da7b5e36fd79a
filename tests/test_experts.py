"""Mixtures of experts: the routers' loss by hand and against the library's, in training, and what engines are told."""

import io
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from processes import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import pretraining
import supervised_finetuning
from benchmarks.family_matrix import FAMILIES, write_model
from suwen.arguments import ModelArguments
from suwen.batches import pack_rows, pad_rows
from suwen.experts import RouterWatch, balance_loss, coefficient, find_routers, mark_leaf_modules, stacked_experts
from suwen.head import add_scoring_head
from suwen.lineage import read_json
from suwen.models import prepare_experts

MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v2", "deepseek-moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    found = {}
    for name in MIXTURES:
        folder = tmp_path_factory.mktemp(name)
        with redirect_stdout(io.StringIO()):
            write_model(FAMILIES[name], folder)
        found[name] = str(folder)
    return found


def load(folder: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder)


def rows(count: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(5, 400, (length,), generator=generator).tolist() for length in (21, 9, 14)[:count]]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def test_the_loss_is_k_for_even_use_and_more_for_uneven_use():
    even = torch.full((4, 4), 0.25)
    assert balance_loss(even, torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])).item() == 2
    # all four tokens to expert 0, which gets probability 0.7: 4 * 1 * 0.7
    one = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).repeat(4, 1)
    assert balance_loss(one, torch.zeros(4, 1, dtype=torch.long)).item() == pytest.approx(2.8)
    kept = torch.tensor([True, False, True, True])
    one[1] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # padding, not counted
    assert balance_loss(one, torch.tensor([[0], [3], [0], [0]]), kept).item() == pytest.approx(2.8)


@pytest.mark.training
@pytest.mark.parametrize("name", MIXTURES)
def test_every_router_of_a_mixture_is_watched_and_its_weights_learn_from_the_loss(name, folders):
    model = load(folders[name]).train()
    routers = find_routers(model)
    assert routers and len({id(router) for router in routers}) == len(routers)
    watch = RouterWatch(model)
    add_scoring_head(model, watch)
    found = model(**pack_rows(rows()))
    found.router_loss.backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers)
    assert model.eval()(**pack_rows(rows())).router_loss is None


@pytest.mark.training
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_loss_is_the_mean_over_layers_of_the_librarys(name, folders):
    model = load(folders[name]).train()
    batch = pad_rows(rows(), 0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    top = model.config.num_experts_per_tok
    layers = model(**inputs, output_router_logits=True).router_logits
    expected = [load_balancing_loss_func((logits,), 4, top, batch["attention_mask"]) for logits in layers]
    add_scoring_head(model, RouterWatch(model))
    assert model(**batch).router_loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


@pytest.mark.training
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_packed_rows_and_checkpointing_give_the_same_loss_and_gradients(name, folders):
    found = []
    for pack, checkpointing in ((pack_rows, False), (lambda rows: pad_rows(rows, 0), False), (pack_rows, True)):
        model = load(folders[name]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        watch = RouterWatch(model)
        add_scoring_head(model, watch)
        output = model(**pack(rows(1)))
        (output.router_loss - output.logps.sum()).backward()
        assert not watch.decisions
        found.append((output.router_loss.item(), [router.weight.grad for router in find_routers(model)]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_weight_is_the_models_own_in_full_training_and_0_with_lora():
    class Config:
        router_aux_loss_coef = 0.02

    assert coefficient(None, Config, False) == 0.02
    assert coefficient(None, object(), False) == 0.001
    assert coefficient(None, Config, True) == 0
    assert coefficient(0.5, Config, True) == 0.5


def words_for(folder: str, out, *more: str) -> list[str]:
    words = ["--model_name_or_path", folder, "--output_dir", str(out), "--cache_dir", str(out) + "-cache"]
    words += ["--max_steps", "12", "--max_length", "192", "--max_train_samples", "24", "--max_eval_samples", "2"]
    words += ["--num_proc", "1", "--gradient_accumulation_steps", "1", "--save_strategy", "no", "--report_to", "none"]
    words += ["--disable_tqdm", "True", "--use_cpu", "--bf16", "False", "--logging_steps", "4", "--on_bad_rows", "skip"]
    return [*words, *more]


def train(main, folder: str, out, *more: str) -> list[dict]:
    main(words_for(folder, out, *more))
    return read_json(out / "run.json")


@pytest.mark.training
def test_training_with_the_loss_evens_out_what_training_without_it_does_not(folders, tmp_path, capsys):
    found = {}
    for weight in ("0.5", "0"):
        torch.manual_seed(0)
        out = tmp_path / weight
        flags = ["--train_file_dir", "data/pretrain", "--router_aux_loss_coef", weight, "--learning_rate", "5e-3"]
        record = train(pretraining.main, folders["mixtral"], out, *flags)
        said = capsys.readouterr().out
        assert ("router loss" in said) == (weight != "0")
        assert record["arguments"]["router_aux_loss_coef"] == float(weight)
        model = load(str(out)).train()
        assert model.config.router_aux_loss_coef == float(weight)
        add_scoring_head(model, RouterWatch(model))
        tokenizer = AutoTokenizer.from_pretrained(out)
        ids = tokenizer("高血压患者应当低盐饮食，按时服药，定期测量血压。糖尿病的典型症状是多饮、多食、多尿。")[
            "input_ids"
        ]
        found[weight] = model(**pack_rows([{"input_ids": ids, "labels": ids}])).router_loss.item()
    assert 2 <= found["0.5"] < found["0"]


@pytest.mark.training
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek-moe"])
def test_a_resumed_run_goes_on_with_the_experts_that_it_had(name, folders, tmp_path):
    flags = ["--train_file_dir", "data/pretrain", "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(pretraining.main, folders[name], whole, *flags)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(pretraining.main, folders[name], resumed, *flags)
    # A checkpoint holds weights by other names than the result does: read as a model they are the same
    expected = load(str(whole)).state_dict()
    for folder in (resumed, whole / "checkpoint-3"):
        found = load(str(folder)).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.training
def test_four_bits_say_that_experts_stay_as_they_are_and_lora_leaves_routers(folders, tmp_path, capsys):
    flags = ["--train_file_dir", "data/sft", "--use_peft", "True", "--quantization", "4bit", "--max_steps", "1"]
    record = train(supervised_finetuning.main, folders["mixtral"], tmp_path / "sft", *flags)
    count, dtype = stacked_experts(load(folders["mixtral"]))
    assert dtype == "float32" and count == 2 * 4 * 3 * 64 * 96
    assert f"leaves the stacked experts, {count:,} weights, in float32" in capsys.readouterr().out
    assert record["trained_parameters"] < count


@pytest.mark.training
def test_the_loss_is_refused_where_there_are_no_experts(tmp_path):
    with redirect_stdout(io.StringIO()):
        write_model(FAMILIES["llama"], tmp_path / "llama")
    flags = ["--train_file_dir", "data/pretrain", "--router_aux_loss_coef", "0.1"]
    with pytest.raises(ValueError, match="--router_aux_loss_coef: model type 'llama' has no experts"):
        train(pretraining.main, str(tmp_path / "llama"), tmp_path / "pt", *flags)
    with pytest.raises(ValueError, match="--router_aux_loss_coef: found -1.0, expected 0 or more"):
        train(pretraining.main, str(tmp_path / "llama"), tmp_path / "pt", *flags[:2], "--router_aux_loss_coef", "-1")


@pytest.mark.training
@pytest.mark.parametrize("name", MIXTURES)
def test_zero_3_is_told_each_block_of_router_and_experts_once(name, folders):
    pytest.importorskip("deepspeed")
    from deepspeed.utils import get_z3_leaf_modules

    model = load(folders[name])
    assert mark_leaf_modules(model) == len(find_routers(model)) == len(get_z3_leaf_modules(model))
    assert all(any(p.ndim == 3 for p in block.parameters()) for block in get_z3_leaf_modules(model))


@pytest.mark.training
@pytest.mark.parametrize("reward", [False, True])
def test_a_stage_under_zero_3_tells_it_of_the_experts(reward, folders):
    pytest.importorskip("deepspeed")
    from deepspeed.utils import get_z3_leaf_modules

    model = load(folders["mixtral"])
    given = ModelArguments()
    prepare_experts(model, given, False, reward)
    assert not any(getattr(module, "_z3_leaf", False) for module in model.modules())
    engine = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # known for as long as it lives
    assert is_deepspeed_zero3_enabled()
    try:
        prepare_experts(model, given, False, reward)
    finally:
        del engine
        unset_hf_deepspeed_config()
    assert len(get_z3_leaf_modules(model)) == len(find_routers(model)) == 2


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.distributed
def test_two_processes_of_zero_3_train_experts_as_one_does(folders, tmp_path):
    pytest.importorskip("deepspeed")
    flags = "--train_file_dir data/pretrain --max_steps 2 --optim sgd --learning_rate 0.1 --max_grad_norm 0".split()
    flags += "--warmup_steps 0 --packing False --train_sampling_strategy random --router_aux_loss_coef 0".split()
    one, two = tmp_path / "one", tmp_path / "two"
    train(pretraining.main, folders["mixtral"], one, *flags, "--per_device_train_batch_size", "2")
    words = [word for word in words_for(folders["mixtral"], two, *flags) if word != "--use_cpu"]
    run_ranks("pt", [*words, "--per_device_train_batch_size", "1"], two, "zero3")
    start, first, second = (load(str(folder)).state_dict() for folder in (folders["mixtral"], one, two))
    for name in start:
        moved = (first[name] - start[name]).abs().max()
        assert moved > 0 and (first[name] - second[name]).abs().max() < 1e-3 * moved, name
