"""Reward models: the loss, the head, what a score depends on and what it does not, and what held-out scores say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_stages import QUESTIONS, run_stage
from test_training import pairs, settings
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig
from trl import RewardTrainer as TrlRewardTrainer

from suwen import attention
from suwen.architectures.baichuan import BaichuanConfig, BaichuanForCausalLM
from suwen.arguments import RewardArguments
from suwen.batches import collate_ends
from suwen.encoding import ChatEncoder
from suwen.head import add_reward_forward, init_reward_head
from suwen.lineage import find_finished_stage, find_start
from suwen.lora_targets import linear_names
from suwen.merging import merge_adapters
from suwen.models import load_base, load_causal_lm
from suwen.preference import bradley_terry_loss
from suwen.probe import packing_problem
from suwen.reward import load_reward_model
from suwen.rows import PreferenceRows
from suwen.score_report import build_report, by_length, calibrate
from suwen.trainers import RewardTrainer
from template import TEMPLATES

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer(special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["chatml"].jinja)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer).save_pretrained(folder)
    return str(folder)


def reward_model(base: str, varlen: bool = True):
    model = load_base(base, torch.float32, reward=True)
    add_reward_forward(model)
    if varlen:
        model.set_attn_implementation(attention.NAME)
    return model


def train(base: str, config, data, given: RewardArguments | None = None, **options) -> RewardTrainer:
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = RewardTrainer(
        model=reward_model(base), settings=given or RewardArguments(), args=config, train_dataset=data,
        eval_dataset=options.pop("eval_dataset", None), processing_class=tokenizer, max_length=64, **options,
    )  # fmt: skip
    trainer.train()
    return trainer


def run_rm(base: str | None, folder: Path, *more: str) -> dict:
    return run_stage("rm", base, folder, *more)


CONVERSATIONS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": "建议您及时就医。" * (number % 4 + 1)}]
    for number, question in enumerate(QUESTIONS)
]


# The loss and its trainer


def test_the_loss_is_bradley_and_terrys():
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 1.5])
    sigmoid = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx([-math.log(p) for p in sigmoid])
    ahead = bradley_terry_loss(chosen, rejected, torch.tensor([3.0, 0.0]))
    assert ahead.tolist() == pytest.approx([math.log(1 + math.exp(2)), -math.log(sigmoid[1])])
    centred = bradley_terry_loss(chosen, rejected, centering=0.1) - bradley_terry_loss(chosen, rejected)
    assert centred.tolist() == pytest.approx([0.9, 0.4], rel=1e-5)


@pytest.mark.parametrize("padding", [False, True])
def test_pairs_take_the_steps_of_trls_reward_trainer(base, tmp_path, padding):
    data = pairs(6).add_column("margin", [0.5, 0.0, 1.0, 2.0, 0.25, 0.0])
    given = RewardArguments(centering=0.05, margin_scale=1.0)
    ours = train(base, settings(tmp_path / "a", max_steps=3, learning_rate=0.1), data, given, padding=padding)

    class Encoded(TrlRewardTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    kept = (
        "output_dir", "use_cpu", "bf16", "report_to", "per_device_train_batch_size", "optim", "learning_rate",
        "lr_scheduler_type", "max_grad_norm", "max_steps", "save_strategy", "logging_steps", "seed", "disable_tqdm",
    )  # fmt: skip
    values = settings(tmp_path / "b", max_steps=3, learning_rate=0.1).to_dict()
    config = RewardConfig(
        **{name: values[name] for name in kept}, gradient_checkpointing=False, center_rewards_coefficient=0.05,
        max_length=None, disable_dropout=False,
    )  # fmt: skip
    whole = data.map(
        lambda row: {f"{name}_ids": row["prompt_ids"] + row[f"{name}_ids"] for name in ("chosen", "rejected")},
        remove_columns="prompt_ids",
    )
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = load_base(base, torch.float32, reward=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(3)
    theirs = Encoded(model=model, args=config, train_dataset=whole, processing_class=tokenizer)
    theirs.train()
    losses = [[e["loss"] for e in t.state.log_history if "grad_norm" in e] for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    start = torch.cat([p.detach().flatten() for p in load_base(base, torch.float32, reward=True).parameters()])
    moved, other = (torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (ours, theirs))
    assert (moved - start).abs().max() > 2e-3
    torch.testing.assert_close(moved, other, atol=2e-5, rtol=0)


def test_the_first_scores_are_about_as_large_as_1_and_always_the_same(base):
    first, second = (reward_model(base) for _ in range(2))
    assert torch.equal(first.score.weight, second.score.weight)
    wide = torch.nn.Linear(4095, 1, bias=False)
    init_reward_head(wide)
    assert wide.weight.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_packing_batch_size_and_padding_side_do_not_change_a_score(base):
    model, data = reward_model(base), list(pairs(7))
    tokenizer = tiny_tokenizer()

    def scores(batch) -> torch.Tensor:
        batch = {name: value for name, value in batch.items() if name not in ("margins", "numbers")}
        with torch.no_grad():
            return model(**batch).scores

    expected = []
    for pair in data:
        for answer in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([pair["prompt_ids"] + pair[answer]])
            with torch.no_grad():
                expected.append(model(input_ids=ids, score_at=torch.tensor([ids.shape[1] - 1])).scores.item())
    for pad in (None, 0):
        together = scores(collate_ends([data], pad))
        apart = torch.cat([scores(collate_ends([[pair]], pad)) for pair in data])
        assert together.tolist() == pytest.approx(expected, abs=1e-5)
        assert apart.tolist() == pytest.approx(expected, abs=1e-5)
    # transformers' own forward, padded on the left: the last real token
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids("<s>")
    longest = max(len(p["prompt_ids"]) + len(p["chosen_ids"]) for p in data)
    rows = [p["prompt_ids"] + p["chosen_ids"] for p in data]
    ids = torch.tensor([[model.config.pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = (torch.arange(longest) >= torch.tensor([[longest - len(row)] for row in rows])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        left = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]
    assert left.tolist() == pytest.approx(expected[::2], abs=1e-5)


def test_an_answer_of_one_token_is_scored_at_that_token(base):
    pair = {"prompt_ids": [7, 8, 9], "chosen_ids": [11], "rejected_ids": [12]}
    assert collate_ends([[pair]])["score_at"].tolist() == [3, 4]
    assert collate_ends([[pair]], 0)["score_at"].tolist() == [3, 7]


def test_the_probe_knows_reward_models(base, tmp_path):
    config = settings(tmp_path)
    assert packing_problem(reward_model(base), 320, config, pairs=True) is None
    assert packing_problem(reward_model(base, varlen=False), 320, config, pairs=True) is not None


def test_evaluation_gives_every_pair_its_scores(base, tmp_path):
    data = pairs(9, seed=2)
    config = settings(tmp_path, learning_rate=0.0, per_device_eval_batch_size=2)
    trainer = train(base, config, pairs(4), eval_dataset=data)
    found = trainer.evaluate()
    model = reward_model(base)
    for pair, scores in zip(data, trainer.held_out_scores, strict=True):
        for answer, score in zip(("chosen_ids", "rejected_ids"), scores, strict=True):
            ids = torch.tensor([pair["prompt_ids"] + pair[answer]])
            with torch.no_grad():
                assert model(input_ids=ids, score_at=torch.tensor([-1])).scores.item() == pytest.approx(score, abs=1e-5)
    ahead = trainer.held_out_scores[:, 0] - trainer.held_out_scores[:, 1]
    assert found["eval_accuracy"] == pytest.approx((ahead > 0).mean())
    assert found["eval_margin"] == pytest.approx(ahead.mean(), abs=1e-5)
    assert found["eval_score_mean"] == pytest.approx(trainer.held_out_scores.mean(), abs=1e-5)
    assert found["eval_score_std"] == pytest.approx(trainer.held_out_scores.std(), abs=1e-5)


# The stage and what it leaves


@pytest.mark.parametrize("lora", [[], ["--use_peft"]], ids=["full", "LoRA"])
def test_a_reward_model_comes_back_in_one_call(base, tmp_path, lora):
    record = run_rm(base, tmp_path, "--max_steps", "4", "--learning_rate", "1e-2", *lora)
    out = tmp_path / "rm"
    assert record["stage"] == "rm" and record["finished"] and record["evaluation"]["eval_accuracy"] >= 0
    assert (out / "training_curves.png").is_file() and not (out / "generation_config.json").exists()
    weights = load_file(out / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert [tuple(t.shape) for name, t in weights.items() if name.endswith("score.weight")] == [(1, 32)]
    assert not any("lm_head" in name for name in weights)
    # The scores that the evaluation found are those of the saved model, for the texts themselves
    report = json.loads((out / "score_report.json").read_text())
    judge = load_reward_model(str(out))
    scores = judge.score(CONVERSATIONS)
    assert judge.score(CONVERSATIONS, batch_tokens=1) == pytest.approx(scores, abs=1e-5)
    assert judge.score(CONVERSATIONS[::-1])[::-1] == pytest.approx(scores, abs=1e-5)
    assert len(set(scores)) > 1 and report["pairs"] == record["data"]["validation_rows"]
    assert torch.equal(judge.head, next(t for n, t in weights.items() if n.endswith("score.weight"))[0])
    if not lora:
        other = AutoModelForSequenceClassification.from_pretrained(out)  # what TRL and vLLM load
        ids = [torch.tensor([judge.encode(messages)]) for messages in CONVERSATIONS]
        with torch.no_grad():
            assert [other(input_ids=row).logits.item() for row in ids] == pytest.approx(scores, abs=1e-5)


def test_the_held_out_scores_are_those_of_the_saved_model(base, tmp_path):
    record = run_rm(base, tmp_path, "--max_steps", "3", "--learning_rate", "1e-2", "--use_peft")
    judge = load_reward_model(str(tmp_path / "rm"))
    encode = PreferenceRows(ChatEncoder(judge.encoder.tokenizer), 128)
    rows = [json.loads(line) for line in (tmp_path / "rm.jsonl").read_text(encoding="utf-8").splitlines()]
    scored = []
    for row in rows:
        prompt = [{"role": "user", "content": row["conversations"][0]["value"]}]
        talks = [[*prompt, {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")]
        [pair], _ = encode(
            {"messages": prompt, **{n: [t[-1]] for n, t in zip(("chosen", "rejected"), talks, strict=True)}}
        )
        assert judge.encode(talks[0]) == pair["prompt_ids"] + pair["chosen_ids"]
        scored.append(judge.score(talks))
    report = json.loads((tmp_path / "rm" / "score_report.json").read_text())
    every = sorted(round(chosen, 4) for chosen, _ in scored)
    assert (
        min(every) - 1e-3 <= report["scores"]["chosen"]["5%"] <= report["scores"]["chosen"]["95%"] <= max(every) + 1e-3
    )
    assert record["evaluation"]["eval_score_std"] > 0


def test_the_best_checkpoints_scores_are_reported_where_its_weights_are_saved(base, tmp_path):
    flags = ["--max_steps", "2", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "True"]
    record = run_rm(base, tmp_path, *flags, "--learning_rate", "0.1")  # too large for a second step
    assert record["training"]["weights_of"] == "checkpoint-1, the best evaluation"
    report = json.loads((tmp_path / "rm" / "score_report.json").read_text())
    assert record["evaluation"]["step"] == 1 and report["accuracy"] == record["evaluation"]["eval_accuracy"]
    means = [report["scores"][name]["mean"] for name in ("chosen", "rejected")]
    assert sum(means) / 2 == pytest.approx(record["evaluation"]["eval_score_mean"], abs=1e-3)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_backbone_trains_its_adapter_and_head(base, tmp_path, quantization):
    flags = ["--use_peft", "--quantization", quantization, "--max_steps", "6", "--learning_rate", "5e-3"]
    record = run_rm(base, tmp_path, *flags, "--eval_on_start", "True")
    assert record["trained_dtype"] == ["float32"]
    weights = load_file(tmp_path / "rm" / "adapter_model.safetensors")
    assert any(name.endswith("score.weight") for name in weights)
    judge = load_reward_model(str(tmp_path / "rm"), quantization=quantization)
    assert len(set(judge.score(CONVERSATIONS))) > 1
    history = json.loads((tmp_path / "rm" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]  # of the same pairs
    assert len(losses) == 2 and losses[-1] < losses[0]


def test_a_quantised_run_goes_on_from_the_adapter_of_an_sft(base, tmp_path):
    lora = ["--use_peft", "--quantization", "4bit", "--max_steps", "1", "--learning_rate", "1e-2"]
    run_stage("sft", base, tmp_path, *lora)
    record = run_rm(str(tmp_path / "sft"), tmp_path, *lora)
    assert [Path(link["path"]).name for link in record["lineage"]] == [Path(base).name, "sft"]
    first, second = (load_file(tmp_path / stage / "adapter_model.safetensors") for stage in ("sft", "rm"))
    assert {name for name in second if "score" not in name} == set(first) and len(second) == len(first) + 1
    assert load_reward_model(str(tmp_path / "rm"), quantization="4bit").score(CONVERSATIONS[:1])


def test_a_reward_model_on_an_sft_adapter_stands_on_the_merged_one(base, tmp_path):
    flags = ["--use_peft", "--max_steps", "1", "--learning_rate", "1e-2"]
    run_stage("sft", base, tmp_path, *flags)
    assert find_start(None, str(tmp_path), "rm")[0] == str(tmp_path / "sft")
    run_rm(None, tmp_path, *flags, "--outputs", str(tmp_path))
    judge = load_reward_model(str(tmp_path / "rm"))
    merged, plain = load_causal_lm(str(tmp_path / "sft")), load_causal_lm(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    found = judge.model.get_parameter(name)
    assert (found - merged.get_parameter(name)).norm() < 0.5 * (found - plain.get_parameter(name)).norm() + 1e-4


def test_a_resumed_run_gives_the_scores_of_an_uninterrupted_one(base, tmp_path):
    flags = ["--use_peft", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-2", "--lora_dropout", "0.1"]
    run_rm(base, tmp_path, *flags)
    whole = load_reward_model(str(tmp_path / "rm")).score(CONVERSATIONS)
    out = tmp_path / "rm"
    for name in ("adapter_model.safetensors", "run.json"):
        (out / name).unlink()
    (out / "checkpoint-4").rename(tmp_path / "later")
    record = run_rm(base, tmp_path, *flags)
    assert record["training"]["resumed_from"].endswith("checkpoint-2")
    assert load_reward_model(str(out)).score(CONVERSATIONS) == pytest.approx(whole, abs=1e-6)


def test_a_reward_model_is_refused_where_answers_are_written(base, tmp_path):
    for flags in ([], ["--use_peft"]):
        folder = tmp_path / str(len(flags))
        folder.mkdir()
        run_rm(base, folder, "--max_steps", "1", *flags)
        out = str(folder / "rm")
        with pytest.raises(ValueError, match="is a reward model, which scores answers"):
            load_causal_lm(out)
        with pytest.raises(ValueError, match="is a reward model, which scores answers"):
            run_stage("dpo", out, folder, "--max_steps", "1")
        if flags:
            with pytest.raises(ValueError, match="is a reward model, which scores answers"):
                merge_adapters(None, [out], str(folder / "merged"))
        assert find_finished_stage(folder) is None, "inference takes no reward model by itself"
    with pytest.raises(ValueError, match="found a model without a head for scores"):
        load_reward_model(base)
    with pytest.raises(ValueError, match="--eval_tasks: a reward model"):
        run_rm(base, tmp_path, "--eval_tasks", "exam")


def test_a_reward_model_can_be_trained_further(base, tmp_path):
    run_rm(base, tmp_path, "--max_steps", "2", "--learning_rate", "1e-2")
    first = load_reward_model(str(tmp_path / "rm")).score(CONVERSATIONS)
    flags = ["--output_dir", str(tmp_path / "next"), "--use_peft", "--max_steps", "1", "--learning_rate", "0"]
    run_rm(str(tmp_path / "rm"), tmp_path, *flags)
    assert load_reward_model(str(tmp_path / "next")).score(CONVERSATIONS) == pytest.approx(first, abs=1e-5)


def test_a_run_resumed_at_its_end_still_reports_its_scores(base, tmp_path):
    flags = ["--max_steps", "2", "--learning_rate", "1e-2"]
    record = run_rm(base, tmp_path, *flags)
    out = tmp_path / "rm"
    report = (out / "score_report.json").read_text()
    (out / "score_report.json").unlink()
    (out / "run.json").write_text(json.dumps({**record, "finished": False}))
    run_rm(base, tmp_path, *flags)
    assert (out / "score_report.json").read_text() == report


def test_a_conversation_that_cannot_be_scored_is_refused(base, tmp_path):
    run_rm(base, tmp_path, "--max_steps", "1")
    judge = load_reward_model(str(tmp_path / "rm"))
    with pytest.raises(ValueError, match="ends with 'user', expected an assistant's answer"):
        judge.score([CONVERSATIONS[0][:1] * 2])
    with pytest.raises(ValueError, match="do not fit the reward model's window of 512"):
        judge.score([[CONVERSATIONS[0][0], {"role": "assistant", "content": "长" * 600}]])
    # Old turns give way
    history = [{"role": "user", "content": "长" * 170}, {"role": "assistant", "content": "好"}]
    assert judge.score([[*history, *history, *CONVERSATIONS[0]]]) == pytest.approx(
        judge.score([CONVERSATIONS[0]]), abs=1e-5
    )


# What held-out scores say


def test_calibration_by_hand():
    ahead = np.array([0.0, math.log(3), math.log(3), -math.log(3), 8.0])  # beliefs 0.5, 0.75 three times, near 1
    found = calibrate(ahead)
    assert found.counts.tolist() == [1, 3, 1]
    assert found.accuracy.tolist() == pytest.approx([0, 2 / 3, 1])
    assert found.confidence[:2].tolist() == pytest.approx([0.5, 0.75])
    certain = 1 / (1 + math.exp(-8))
    assert found.error == pytest.approx((0.5 + 3 * (0.75 - 2 / 3) + (1 - certain)) / 5)


def test_scores_that_are_log_odds_are_calibrated():
    generator = np.random.default_rng(0)
    ahead = generator.normal(0, 2, 20_000)
    right = generator.random(20_000) < 1 / (1 + np.exp(-np.abs(ahead)))
    assert calibrate(np.where(right, 1, -1) * np.abs(ahead)).error < 0.02
    assert calibrate(3 * np.where(right, 1, -1) * np.abs(ahead)).error > 0.05


def test_the_report_counts_by_fault_and_beside_the_lengths():
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 0.0]])
    lengths = np.array([[10, 10], [20, 10], [10, 20], [30, 10]])
    assert by_length(lengths, longer_wins=True).tolist() == [0.5, 1, 0, 1]
    report = build_report(scores, lengths, ["omission", "omission", None, "wrong value"], longer_wins=True)
    assert report["accuracy"] == 0.75 and report["by_length"] == 0.625 and report["margin"] == 1.25
    assert report["length_matched"]["pairs"] == 1 and report["length_matched"]["accuracy"] == 1
    assert {name: (entry["pairs"], entry["accuracy"]) for name, entry in report["by_fault"].items()} == {
        "omission": (2, 0.5), "unnamed": (1, 1.0), "wrong value": (1, 1.0),
    }  # fmt: skip
    assert report["scores"]["chosen"]["mean"] == 1.5 and report["scores"]["rejected"]["50%"] == 0
    json.loads(json.dumps(report, allow_nan=False))


def test_faults_and_margins_of_rows_reach_the_report(base, tmp_path):
    file = tmp_path / "named.jsonl"
    rows = [
        {"prompt": f"{question}{number}", "chosen": f"请就医{number}。", "rejected": f"不用管{number}。",
         "fault": ("wrong value", "omission")[number % 2], "margin": 2.0}
        for number, question in enumerate(QUESTIONS * 4)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    losses = []
    for scale in ("0", "1"):
        flags = ["--train_file_dir", str(file), "--max_steps", "1", "--margin_scale", scale, "--resume", "never"]
        record = run_rm(base, tmp_path, *flags, "--learning_rate", "0", "--warmup_steps", "0")
        losses.append(record["evaluation"]["eval_loss"])
    report = json.loads((tmp_path / "rm" / "score_report.json").read_text())
    assert set(report["by_fault"]) <= {"wrong value", "omission"} and report["by_fault"]
    assert losses[1] > losses[0] + 1


def test_a_family_without_such_a_head_is_refused(tmp_path):
    config = BaichuanConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    BaichuanForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'baichuan' has no class with a head for scores"):
        load_base(str(tmp_path), torch.float32, reward=True)


def test_lora_targets_leave_the_head_to_itself(base):
    model = reward_model(base)
    assert "score" not in linear_names(model) and "q_proj" in linear_names(model)
