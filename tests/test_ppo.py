"""The trainer of PPO, RLOO and GRPO on a tiny model: what an update is, resuming, processes, memory, alarms."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from processes import run_ranks
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, TrainingArguments

import ppo_training
from benchmarks import reinforcement as reinforcement_benchmark
from suwen import attention, head, reinforcement
from suwen import policy_gradient as pg
from suwen.arguments import PolicyArguments
from suwen.checkpoint import list_checkpoints
from suwen.encoding import ChatEncoder
from suwen.head import add_scoring_head
from suwen.lineage import read_json
from suwen.nonfinite import ROWS_FILE
from suwen.ppo import PolicyTrainer
from suwen.reward import load_reward_model
from suwen.rewards import Weighted
from suwen.rows import PromptRows
from suwen.statistics import compare_correct
from template import TEMPLATES

pytestmark = pytest.mark.training
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])


def build_tokenizer():
    return tiny_tokenizer(special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=TEMPLATES["chatml"].jinja)


def scores_of_length(samples):
    """A reward with an answer for everything: short answers, and many different tokens."""
    return [len(set(sample.answer.token_ids)) / 8 - len(sample.answer.token_ids) / 16 for sample in samples]


def build_trainer(folder, lora: bool = True, own=(), rewards=None, **given) -> PolicyTrainer:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model(tokenizer)
    add_scoring_head(model)
    model.set_attn_implementation(attention.NAME)
    encoder = ChatEncoder(tokenizer)
    questions = [f"第{n}个问题：高血压怎么办？" + "请问医生。" * (n % 4) for n in range(12)]
    encode = PromptRows(encoder, 128)
    rows = [encode({"messages": [{"role": "user", "content": text}], "item": ""})[0][0] for text in questions]
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 3, "seed": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "linear", "gradient_checkpointing": False,
    }  # fmt: skip
    settings = {"max_new_tokens": 8, "num_mini_batches": 2, "num_ppo_epochs": 2, "num_generations": 4}
    return PolicyTrainer(
        model=model,
        settings=PolicyArguments(**settings | dict(own)),
        args=TrainingArguments(**defaults | given),
        train_dataset=Dataset.from_list(rows[:8]),
        eval_dataset=Dataset.from_list(rows[8:]),
        encoder=encoder,
        rewards=rewards or [Weighted("length", 1.0, scores_of_length)],
        peft_config=LORA if lora else None,
        max_length=64,
    )


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all weights"])
def test_before_the_first_step_the_policy_is_its_reference(lora, tmp_path):
    trainer = build_trainer(tmp_path, lora)
    rollout = trainer.draw(0)
    assert torch.equal(rollout.logps, rollout.reference_logps)
    assert rollout.mask.sum() > 0 and (rollout.entropy[rollout.mask.bool()] > 0).all()


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all weights"])
def test_the_reference_stays_and_the_policy_comes_back(lora, tmp_path):
    trainer = build_trainer(tmp_path, lora)
    first = trainer.draw(0)
    trainer.update()
    mask = first.mask
    moved, _, _ = trainer.measure(first.samples, mask)
    with trainer.reference():
        kept, _, _ = trainer.measure(first.samples, mask)
    again, _, _ = trainer.measure(first.samples, mask)
    torch.testing.assert_close(kept, first.reference_logps, atol=1e-5, rtol=0)
    assert torch.equal(moved, again) and (moved - kept).abs().max() > 1e-3
    trained = [name for name, parameter in trainer.policy.named_parameters() if parameter.requires_grad]
    assert len(trained) == (10 if lora else 22 + 1)


def test_what_is_measured_is_what_the_whole_logits_say(tmp_path):
    trainer = build_trainer(tmp_path, own={"temperature": 0.7})
    trainer.update()  # so that the critic is no longer 0
    rollout = trainer.draw(1)
    model = trainer.model.eval()
    for place, sample in enumerate(rollout.samples):
        prompt, answer = sample.prompt_ids, sample.answer.token_ids
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        spread = torch.distributions.Categorical(logits=output.logits[0, at] / 0.7)
        values = trainer.policy.value_head(output.hidden_states[-1][0, at])[:, 0]
        found = [matrix[place, : len(answer)] for matrix in (rollout.logps, rollout.entropy, rollout.values)]
        expected = [spread.log_prob(torch.tensor(answer)), spread.entropy(), values.detach()]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert rollout.values.abs().max() > 1e-3


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_an_optimiser_step_is_that_of_a_plain_loop(algorithm, tmp_path):
    """Padded logits, autograd and the formulas of the papers, on answers that are some steps old."""
    own = {"algorithm": algorithm, "num_mini_batches": 1, "entropy_coef": 0.01, "kl_coef": 0.1}
    trainer = build_trainer(tmp_path, own=own, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
    rollout = trainer.draw(0)
    scores = trainer.total_scores(rollout.samples, rollout.scores)
    with torch.no_grad():  # the policy has moved since it drew
        for name, parameter in trainer.policy.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        rollout.logps, rollout.entropy, rollout.values = trainer.measure(rollout.samples, rollout.mask)
        for name, parameter in trainer.policy.named_parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name) + 1))
    advantages, returns = trainer.credit(rollout, scores)
    trained = {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}

    total, tokens = torch.zeros(()), int(rollout.mask.sum())
    for place, sample in enumerate(rollout.samples):
        prompt, answer = sample.prompt_ids, sample.answer.token_ids
        length = len(answer)
        output = trainer.model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        at = slice(len(prompt) - 1, len(prompt) + length - 1)
        spread = torch.distributions.Categorical(logits=output.logits[0, at])
        logps, given = spread.log_prob(torch.tensor(answer)), advantages[place, :length]
        ratio = (logps - rollout.logps[place, :length]).exp()
        total = total - torch.minimum(ratio * given, ratio.clamp(0.8, 1.2) * given).sum()
        total = total - 0.01 * spread.entropy().sum()
        if algorithm == "ppo":
            values = trainer.policy.value_head(output.hidden_states[-1][0, at])[:, 0]
            old, target = rollout.values[place, :length], returns[place, :length]
            near = torch.clamp(values, old - 0.2, old + 0.2)
            total = total + 0.1 * 0.5 * torch.maximum((values - target) ** 2, (near - target) ** 2).sum()
        if algorithm == "grpo":
            difference = rollout.reference_logps[place, :length] - logps
            total = total + 0.1 * (difference.exp() - 1 - difference).sum()
    slopes = dict(zip(trained, torch.autograd.grad(total / tokens, list(trained.values())), strict=True))

    _, norm = trainer.optimiser_step(rollout, list(range(len(rollout.samples))), advantages, returns)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.detach(), before[name] - 1e-2 * slopes[name], atol=2e-7, rtol=1e-4)
    assert norm == pytest.approx(torch.cat([s.flatten() for s in slopes.values()]).norm().item(), rel=1e-4)
    assert norm > 1e-3


def test_credit_is_what_the_papers_say(tmp_path):
    trainer = build_trainer(tmp_path, own={"whiten_advantages": False, "kl_coef": 0.3})
    rollout = trainer.draw(0)
    rollout.reference_logps = rollout.logps - 0.1 * rollout.mask
    rollout.values = 0.2 * rollout.mask
    scores = torch.arange(16.0)
    lengths = rollout.mask.sum(1)
    found, returns = trainer.credit(rollout, scores)
    rewards = pg.token_rewards(scores, 0.1 * rollout.mask, rollout.mask, 0.3)
    torch.testing.assert_close(found, pg.advantages(rewards, rollout.values, rollout.mask, 1.0, 0.95))
    torch.testing.assert_close(returns, found + rollout.values)
    trainer.settings.algorithm = "rloo"
    found, _ = trainer.credit(rollout, scores)
    whole = (scores - 0.3 * 0.1 * lengths).view(4, 4)
    others = (whole.sum(1, keepdim=True) - whole) / 3
    torch.testing.assert_close(found, (whole - others).flatten()[:, None] * rollout.mask)


def test_answers_hang_on_their_seed_alone(tmp_path):
    trainer = build_trainer(tmp_path)
    whole = trainer.draw(2)
    trainer.settings.generation_batch_size = 3
    pieces = trainer.draw(2)
    assert [s.answer for s in whole.samples] == [s.answer for s in pieces.samples]
    groups = [whole.samples[at : at + 4] for at in range(0, 16, 4)]
    assert all(len({tuple(s.prompt_ids) for s in group}) == 1 for group in groups)
    assert len({tuple(s.answer.token_ids) for s in groups[0]}) > 1
    assert [s.answer for s in trainer.draw(0).samples] != [s.answer for s in whole.samples]


def test_each_epoch_asks_every_prompt_once(tmp_path):
    trainer = build_trainer(tmp_path)  # 8 prompts, 4 an update
    epochs = [trainer.rows_of_update(step) + trainer.rows_of_update(step + 1) for step in (0, 2, 4)]
    for number, rows in enumerate(epochs):
        assert sorted(row for row, _ in rows) == list(range(8)) and {epoch for _, epoch in rows} == {number}
    assert epochs[0] != epochs[1]


def test_answers_without_an_end_are_penalised(tmp_path):
    nothing = [Weighted("nothing", 1.0, lambda samples: [0.0] * len(samples))]
    trainer = build_trainer(tmp_path, rewards=nothing, own={"missing_eos_penalty": 2.5})
    rollout = trainer.draw(0)
    cut = [sample.answer.finish_reason == "length" for sample in rollout.samples]
    assert trainer.total_scores(rollout.samples, rollout.scores).tolist() == [-2.5 * c for c in cut] and any(cut)


class LargestTensor(TorchDispatchMode):
    """The largest tensor over the vocabulary that any operation makes, in elements."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.largest = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and self.vocabulary in tensor.shape:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_ever_made(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 8 * 602)
    trainer = build_trainer(
        tmp_path, own={"max_new_tokens": 32, "generation_batch_size": 8, "num_mini_batches": 1},
        per_device_train_batch_size=16, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.capacity = 4096  # one micro-batch
    vocabulary = trainer.model.config.vocab_size
    with LargestTensor(vocabulary) as seen:
        entry = trainer.update()
    tokens = entry["length"] * 16
    assert tokens > 200
    # embedding and head (V x 32); logits are those of 8 tokens: a step of generation, a chunk of scoring
    assert vocabulary * 8 <= seen.largest <= vocabulary * 32 < tokens * vocabulary / 4


def test_with_an_adapter_policy_critic_and_reference_are_one_backbone(tmp_path):
    trainer = build_trainer(tmp_path)
    assert trainer.reference.copies == []
    shapes = [tuple(p.shape) for p in trainer.policy.parameters()]
    assert shapes.count((602, 32)) == 2, "embedding and head, once each"
    full = build_trainer(tmp_path, lora=False)
    assert sum(c.numel() for c in full.reference.copies) == sum(p.numel() for p in full.model.parameters())


# The stage


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer).save_pretrained(folder)
    return str(folder)


def exam_file(folder: Path) -> str:
    file = folder / "exam.jsonl"
    rows = []
    for number in range(24):
        question = f"{number}选哪个？\nA 药{number}\nB 水"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "AB"[number % 2]}]
        rows.append({"messages": turns})
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def arguments(base: str, folder: Path, *more: str) -> list[str]:
    words = f"""--model_name_or_path {base} --train_file_dir {exam_file(folder)} --output_dir {folder / "ppo"}
        --cache_dir {folder / "cache"} --num_proc 1 --bf16 False --use_cpu --max_length 128 --max_new_tokens 8
        --validation_split_fraction 0.2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 4
        --num_ppo_epochs 2 --num_mini_batches 2 --eval_steps 2 --save_steps 2 --disable_tqdm True --report_to none
        --reward exam=1.0,format=0.2,language=1.0 --missing_eos_penalty 0.2 --learning_rate 1e-3 --target_kl 1.0
        --outputs {folder}"""
    return [*words.split(), *more]


def run_ppo(base: str, folder: Path, *more: str) -> dict:
    folder.mkdir(exist_ok=True)
    ppo_training.main(arguments(base, folder, *more))
    return json.loads((folder / "ppo" / "run.json").read_text(encoding="utf-8"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    [file] = (folder / "ppo").glob("*model.safetensors")
    return load_file(file)


def history_of(folder: Path, step: int) -> list[dict]:
    state = json.loads((folder / "ppo" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    times = ("rollout_seconds", "update_seconds", "eval_runtime")
    return [{k: v for k, v in entry.items() if k not in times} for entry in state["log_history"]]


def test_the_minimal_call_leaves_all_that_is_promised(base, tmp_path, capsys):
    record = run_ppo(base, tmp_path, "--report_to", "tensorboard")
    out = tmp_path / "ppo"
    assert record["finished"] and record["training"]["steps"] == 4 and record["training"]["tokens"] > 0
    assert record["rewards"] == {"exam": 1.0, "format": 0.2, "language": 1.0}
    assert record["best"]["by"] == "eval_score" and "eval_score/exam" in record["evaluation"]
    assert (out / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").rglob("events*")) and (out / "model.safetensors").is_file()
    assert "# Model by reinforcement learning" in (out / "README.md").read_text(encoding="utf-8")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {s["step"] for s in samples} == {1, 2, 3, 4} and {"messages", "answer", "scores", "kl"} <= samples[0].keys()
    assert not [key for key in load_file(out / "model.safetensors") if "value_head" in key]
    printed = capsys.readouterr().out
    assert "update 4/4  score" in printed and "held out: score" in printed
    ppo_training.main(arguments(base, tmp_path))
    assert "finished already" in capsys.readouterr().out


def test_a_held_out_prompt_that_several_pairs_share_is_asked_once(base, tmp_path, capsys):
    """As often as it has pairs it would count in the score, and an interval would take the copies for evidence."""
    questions = ["头痛怎么办？", "咳嗽怎么办？", "头痛怎么办？", "头痛怎么办？"]
    rows = [{"prompt": text, "chosen": f"多休息{n}", "rejected": f"不管{n}"} for n, text in enumerate(questions)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    flags = ["--reward", "language=1.0", "--validation_file_dir", str(file), "--do_train", "False", "--do_eval"]
    ppo_training.main(arguments(base, tmp_path, *flags))
    lines = (tmp_path / "ppo" / "held_out_answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [0, 1]
    assert "held out: 2 different prompts in 4 rows, each asked once" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [(), ("--use_peft", "True", "--algorithm", "rloo")], ids=["ppo", "rloo with LoRA"])
def test_a_resumed_run_is_the_uninterrupted_one_sample_for_sample(extra, base, tmp_path, monkeypatch):
    run_ppo(base, tmp_path / "whole", *extra)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:  # in the middle of the update after the checkpoint
        context.setattr(
            reinforcement,
            "save_checkpoint",
            lambda *given, save=reinforcement.save_checkpoint: (save(*given), killed()),
        )
        with pytest.raises(KeyboardInterrupt):
            run_ppo(base, tmp_path / "halves", *extra, "--save_steps", "2")
    run_ppo(base, tmp_path / "halves", *extra, "--save_steps", "2")
    assert history_of(tmp_path / "halves", 4) == history_of(tmp_path / "whole", 4)
    for name in ("samples.jsonl", "held_out_answers.jsonl"):
        texts = [(tmp_path / run / "ppo" / name).read_text(encoding="utf-8") for run in ("whole", "halves")]
        assert texts[0] == texts[1]
    whole, halves = weights_of(tmp_path / "whole"), weights_of(tmp_path / "halves")
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("lora", ["True", "False"])
def test_a_policy_trains_in_bfloat16(lora, base, tmp_path):
    flags = ["--use_peft", lora, "--max_steps", "2", "--bf16", "True", "--logging_steps", "1"]
    record = run_ppo(base, tmp_path, *flags)
    assert record["finished"] and record["trained_dtype"] == ["float32"]
    first, *_ = (entry for entry in history_of(tmp_path, 2) if "kl" in entry)
    assert abs(first["kl"]) < 1e-3  # the policy is its own reference, in the same precision


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_base_trains_and_its_adapter_goes_on_against_itself(quantization, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    extra = ("--quantization", quantization, "--use_peft", "True", "--max_steps", "2", "--learning_rate", "1e-2")
    record = run_ppo(base, tmp_path / "one", *extra)
    assert record["finished"] and (tmp_path / "one" / "ppo" / "adapter_model.safetensors").is_file()
    record = run_ppo(str(tmp_path / "one" / "ppo"), tmp_path / "two", *extra)
    first = history_of(tmp_path / "two", 2)[1]
    assert abs(first["kl"]) < 1e-6, "the reference is the adapter that the run goes on from, not the bare base"
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys() and any(not torch.equal(one[name], two[name]) for name in one)


SPREAD = 2.5  # of the scores of a reward model in its own evaluation


def reward_model_folder(folder: Path) -> str:
    """A reward model of another tokenizer and template, as `run_rm.sh` leaves it."""
    tokenizer = tiny_tokenizer(style="metaspace", chat_template=TEMPLATES["vicuna"].jinja)
    tokenizer.pad_token = tokenizer.eos_token
    config = tiny_model(tokenizer).config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    torch.manual_seed(7)
    model = LlamaForSequenceClassification(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    record = {"stage": "rm", "finished": True, "evaluation": {"eval_score_std": SPREAD}}
    (folder / "run.json").write_text(json.dumps(record))
    return str(folder)


def test_a_reward_model_of_another_tokenizer_scores_answers_and_starts_the_critic(base, tmp_path, monkeypatch):
    folder = reward_model_folder(tmp_path / "rm")
    begun = []
    monkeypatch.setattr(
        PolicyTrainer, "draw", lambda self, step, draw=PolicyTrainer.draw: begun.append(draw(self, step)) or begun[-1]
    )
    words = arguments(base, tmp_path, "--max_steps", "1", "--do_train")
    at = words.index("--reward")
    ppo_training.main(words[:at] + words[at + 2 :])  # the finished reward model in --outputs is found
    record = json.loads((tmp_path / "ppo" / "run.json").read_text(encoding="utf-8"))
    name = f"model:{folder}"
    assert record["rewards"] == {name: 1.0}
    [rollout] = begun
    model = load_reward_model(folder)
    conversations = [
        [*sample.messages, {"role": "assistant", "content": sample.answer.content}] for sample in rollout.samples
    ]
    expected = [score / SPREAD for score in model.score(conversations)]
    assert rollout.scores[name].tolist() == pytest.approx(expected, abs=1e-5)
    assert rollout.scores[name].std() > 0
    hidden = AutoModelForCausalLM.from_pretrained(base).model
    for place, sample in enumerate(rollout.samples):
        prompt, answer = sample.prompt_ids, sample.answer.token_ids
        with torch.no_grad():
            states = hidden(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(
            rollout.values[place, : len(answer)], states @ model.head / SPREAD, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("quantization", ["8bit", "4bit", "2bit"])
def test_a_reward_model_is_loaded_in_the_bits_that_are_asked_for(quantization, base, tmp_path, monkeypatch):
    folder = reward_model_folder(tmp_path / "rm")
    begun = []
    monkeypatch.setattr(
        PolicyTrainer, "draw", lambda self, step, draw=PolicyTrainer.draw: begun.append(draw(self, step)) or begun[-1]
    )
    words = ["--reward", f"model:{folder}=1.0", "--reward_quantization", quantization, "--max_steps", "1", "--do_train"]
    run_ppo(base, tmp_path, *words)
    [rollout] = begun
    rows = [[*sample.messages, {"role": "assistant", "content": sample.answer.content}] for sample in rollout.samples]
    whole, found = (load_reward_model(folder, kind) for kind in ("none", quantization))
    name = f"model:{folder}"
    scores = rollout.scores[name].tolist()
    assert scores == pytest.approx([score / SPREAD for score in found.score(rows)], abs=1e-4)
    assert scores != pytest.approx([score / SPREAD for score in whole.score(rows)], abs=1e-4)


def assert_same_history(one: list[dict], two: list[dict]) -> None:
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=2e-3, abs=2e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_two_processes_are_one(algorithm, base, tmp_path):
    extra = ["--algorithm", algorithm, "--optim", "sgd", "--learning_rate", "0.1"]
    run_ppo(base, tmp_path / "one", *extra)
    two = tmp_path / "two"
    two.mkdir()
    run_ranks("ppo", [*arguments(base, two, *extra), "--per_device_train_batch_size", "1"], two / "ppo", "ddp")
    assert_same_history(history_of(tmp_path / "one", 4), history_of(two, 4))
    start = load_file(Path(base) / "model.safetensors")
    one, other = weights_of(tmp_path / "one"), weights_of(two)
    moved = max((one[name] - start[name]).abs().max().item() for name in start)
    apart = max((one[name] - other[name]).abs().max().item() for name in start)
    assert apart < 1e-2 * moved


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("extra", [(), ("--use_peft", "True")], ids=["all weights", "adapter"])
def test_partitioned_processes_are_one(stage, extra, base, tmp_path):
    pytest.importorskip("deepspeed")
    run_ppo(base, tmp_path / "one", *extra)
    two = tmp_path / "two"
    two.mkdir()
    words = [word for word in arguments(base, two, *extra) if word != "--use_cpu"]
    words += ["--per_device_train_batch_size", "1"]
    run_ranks("ppo", words, two / "ppo", f"zero{stage}")
    assert_same_history(history_of(tmp_path / "one", 4), history_of(two, 4))
    whole, trained = history_of(two, 4), load_file(two / "ppo" / "checkpoint-4" / reinforcement.TRAINED)
    result = weights_of(two)
    saved = {name.removeprefix("model.").replace(".default", ""): tensor for name, tensor in trained.items()}
    assert all(torch.equal(saved[name], tensor) for name, tensor in result.items())
    shutil.rmtree(two / "ppo" / "checkpoint-4")
    (two / "ppo" / "run.json").write_text(json.dumps(read_json(two / "ppo" / "run.json") | {"finished": False}))
    text = run_ranks("ppo", words, two / "ppo", f"zero{stage}")[0]
    assert "going on from" in text and history_of(two, 4) == whole
    assert all(torch.equal(tensor, result[name]) for name, tensor in weights_of(two).items())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--reward", "exma=1.0"], "--reward: found 'exma'"),
        (["--reward", "exam=much"], "expected a number behind the ="),
        (["--num_generations", "3"], "--num_generations"),
        (["--max_new_tokens", "125"], "--max_new_tokens: found 125"),
        (["--algorithm", "grpo", "--kl_estimator", "k1"], "--kl_estimator k1"),
        (["--algorithm", "rloo", "--num_generations", "1"], "--num_generations: found 1"),
        (["--rollout_server", "http://127.0.0.1:1"], "add --use_peft True"),
        (["--temperature", "0"], "--temperature"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha"),
        (["--whiten_rewards"], "--whiten_rewards is not available"),
    ],
)
def test_a_mistake_gets_one_line(words, expected, base, tmp_path):
    with pytest.raises(ValueError, match=".*") as error:
        run_ppo(base, tmp_path, *words)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_step_that_is_no_number_is_refused_or_left_out_as_in_the_other_stages(tmp_path, capsys):
    broken = build_trainer(tmp_path, rewards=[Weighted("none", 1.0, lambda samples: [math.nan] * len(samples))])
    with pytest.raises(ValueError, match="update 1: the loss is nan; rows of the batch: .*--on_nonfinite skip"):
        broken.update()
    rows = [json.loads(line) for line in (tmp_path / ROWS_FILE).read_text(encoding="utf-8").splitlines()]
    assert rows and all(row["update"] == 1 and "高血压怎么办" in row["text"] for row in rows)
    broken.nonfinite.choose("skip", deepspeed=False)
    before = {name: tensor.clone() for name, tensor in reinforcement.trained_weights(broken).items()}
    entry = broken.update()
    assert broken.nonfinite.skipped == 4 and entry["grad_norm"] == 0 and math.isfinite(entry["loss"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in reinforcement.trained_weights(broken).items())
    broken.history.append({**broken.update(), "step": 2})
    reinforcement.save_checkpoint(broken, tmp_path)
    with pytest.raises(ValueError, match="10 steps one after another were left out"):
        broken.update()
    assert capsys.readouterr().out.count("left out") == 9
    other = build_trainer(tmp_path)
    reinforcement.load_checkpoint(other, tmp_path / "checkpoint-2")
    assert other.nonfinite.counted() == {"skipped_steps": 8}


def test_a_result_that_is_not_what_is_in_memory_is_found(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path)
    trainer.save_model(str(tmp_path / "good"))
    write = trainer.model.save_pretrained

    def damaged(folder, **options):
        write(folder, **options)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({name: tensor + (number == 0) for number, (name, tensor) in enumerate(tensors.items())}, file)

    monkeypatch.setattr(trainer.model, "save_pretrained", damaged)
    with pytest.raises(RuntimeError, match="is not what is in memory"):
        trainer.save_model(str(tmp_path / "bad"))


def test_the_last_update_is_saved_before_the_result_is(base, tmp_path):
    run_ppo(base, tmp_path, "--max_steps", "1", "--save_steps", "100", "--eval_strategy", "no")
    assert [path.name for path in list_checkpoints(tmp_path / "ppo")] == ["checkpoint-1"]
    saved = load_file(tmp_path / "ppo" / "checkpoint-1" / reinforcement.TRAINED)
    result = weights_of(tmp_path)
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in result.items())


def test_without_a_reward_the_finished_reward_model_is_looked_for(base, tmp_path):
    words = arguments(base, tmp_path)
    at = words.index("--reward")
    with pytest.raises(ValueError, match="--reward: found no finished reward model"):
        ppo_training.main(words[:at] + words[at + 2 :])


def test_old_flags_say_the_same():
    from suwen.arguments import parse_stage_arguments

    words = "--sft_model_path m --reward_model_path outputs/rm --max_source_length 256 --response_length 64".split()
    words += ["--rloo_k", "2"]
    args = parse_stage_arguments(words, "ppo", "", {}, PolicyArguments)
    assert args.model.model_name_or_path == "m" and args.own.reward == "model:outputs/rm=1.0"
    assert (args.own.max_new_tokens, args.own.num_generations, args.data.max_length) == (64, 2, 320)


def test_an_alarm_stops_the_run_and_says_why(base, tmp_path):
    # Steps so large that the KL passes any sensible bound at once; nothing before them was better than the start
    extra = "--learning_rate 0.3 --optim sgd --max_grad_norm 0 --alarm_kl 0.05 --alarm_patience 1 --max_steps 12"
    with pytest.raises(ValueError, match="stopped at update") as error:
        run_ppo(base, tmp_path, *extra.split(), "--eval_steps", "20", "--target_kl", "0.001")
    record = json.loads((tmp_path / "ppo" / "run.json").read_text(encoding="utf-8"))
    assert record["stopped"] == str(error.value) and not record["finished"]
    assert "nats an answer away" in record["stopped"] and "the start was best" in record["stopped"]
    assert not (tmp_path / "ppo" / "model.safetensors").is_file()
    assert (tmp_path / "ppo" / "training_curves.png").is_file()


def test_after_an_alarm_the_weights_are_those_of_the_best_evaluation(tmp_path):
    trainer = build_trainer(tmp_path, save_total_limit=1)
    weights = {}
    for step, score in enumerate((0.1, 0.9, 0.5, 0.2), start=1):
        trainer.history.append({**trainer.update(), "step": step})
        trainer.history.append({"eval_score": score, "step": step})
        reinforcement.save_checkpoint(trainer, tmp_path)
        weights[step] = {name: tensor.clone() for name, tensor in reinforcement.trained_weights(trainer).items()}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    history = list(trainer.history)
    best = reinforcement.best_evaluation(history)
    assert best == {"step": 2, "by": "eval_score", "value": 0.9}
    keeps, what = reinforcement.settle_on_best(trainer, tmp_path, best)
    assert keeps and "checkpoint-2, the best evaluation" in what and trainer.history == history
    found = reinforcement.trained_weights(trainer)
    assert all(torch.equal(tensor, weights[2][name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, weights[4][name]) for name, tensor in found.items())
    kept = tmp_path / "checkpoint-2" / "trained.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1])
    reinforcement.load_checkpoint(trainer, tmp_path / "checkpoint-4")
    keeps, what = reinforcement.settle_on_best(trainer, tmp_path, best)
    assert not keeps and "No weights are saved: checkpoint-2 is damaged (trained.safetensors has " in what
    keeps, what = reinforcement.settle_on_best(trainer, tmp_path, None)
    assert keeps and what == "The weights saved are those of checkpoint-4"


def test_after_an_alarm_the_record_has_the_figures_of_the_weights_that_are_saved(base, tmp_path, monkeypatch):
    scores = {0: 0.1, 1: 0.9, 2: 0.5}
    evaluate = PolicyTrainer.evaluate
    monkeypatch.setattr(PolicyTrainer, "evaluate", lambda self: evaluate(self) | {"eval_score": scores[self.step]})
    found = reinforcement.find_alarm
    told = lambda history, limits: "told" if history[-1]["step"] == 2 else found(history, limits)  # noqa: E731
    monkeypatch.setattr(reinforcement, "find_alarm", told)
    with pytest.raises(ValueError, match="stopped at update 2: told. The weights saved are those of checkpoint-1"):
        run_ppo(base, tmp_path, "--max_steps", "3", "--eval_steps", "1")
    record = json.loads((tmp_path / "ppo" / "run.json").read_text(encoding="utf-8"))
    assert (record["evaluation"]["step"], record["evaluation"]["eval_score"]) == (1, 0.9)


def test_the_held_out_reward_decides_which_evaluation_is_best():
    rows = [(1, 0.1, 0.2), (2, 0.5, 0.9), (3, 0.9, 0.1)]
    entries = [{"step": n, "eval_score": score, "eval_held_out_reward": held} for n, score, held in rows]
    assert reinforcement.best_evaluation(entries)["step"] == 2 and reinforcement.best_evaluation([]) is None


def test_a_policy_server_is_handed_each_adapter_and_asked_with_it(base, tmp_path):
    from http_server import server

    def answer(body, number):
        if "lora_name" in body:
            return 200, {}, {}
        message = {"content": "答案：A" if number % 2 else "答案：B"}
        return 200, {}, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}

    with server(answer) as (url, seen):
        record = run_ppo(base, tmp_path, "--use_peft", "True", "--max_steps", "2", "--rollout_server", url)
    assert record["finished"]
    loads = [body for path, _, body in seen if path.endswith("/load_lora_adapter") and "lora_path" in body]
    asked = [body for path, _, body in seen if path.endswith("/chat/completions")]
    assert len({body["lora_name"] for body in loads}) >= 2
    assert {body["model"] for body in asked} == {body["lora_name"] for body in loads}
    assert any(body["temperature"] == 1.0 and "seed" in body for body in asked)
    samples = [json.loads(x) for x in (tmp_path / "ppo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {sample["answer"] for sample in samples} == {"答案：A", "答案：B"}
    assert all(sample["finish_reason"] == "stop" for sample in samples)


def test_settings_of_the_namespace_are_those_of_the_flags():
    """Limits are filled by name: a flag that is renamed on one side alone would be lost."""
    import dataclasses

    from suwen.policy_alarms import Limits

    flags = {f.name: f.default for f in dataclasses.fields(PolicyArguments) if f.name.startswith("alarm_")}
    assert flags == {f"alarm_{f.name}": f.default for f in dataclasses.fields(Limits)}
    assert SimpleNamespace(**flags).alarm_patience == 5


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    files = reinforcement_benchmark.write_questions(folder / "questions")
    start = reinforcement_benchmark.warm_up(files, folder / "warm_up", threads=1)
    return folder, files, start


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", reinforcement_benchmark.ALGORITHMS)
def test_the_key_of_exam_questions_teaches_what_held_out_questions_ask(algorithm, warmed_up):
    folder, files, start = warmed_up
    updates = {"rloo": 20, "grpo": 60}.get(algorithm, 12)  # these take one step an update, PPO several
    output = folder / algorithm
    found = reinforcement_benchmark.learn(algorithm, 1, updates, start, files, output, "exam=1.0", threads=1)
    before, after = ([right for right, _ in found[name]] for name in ("before", "after"))
    test = compare_correct(before, after)
    accuracy = sum(after) / len(after)
    assert test.value > 0 and test.p < 1e-3
    assert accuracy > reinforcement_benchmark.constant_letter(files["held_out"]) + 0.1
    assert found["kl"] is None or abs(found["kl"]) < 3  # DPO and ORPO do not measure it
