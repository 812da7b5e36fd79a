"""Reinforcement learning from scores: PPO, and its relatives without a critic, RLOO and GRPO.

An update draws answers to prompts, scores them, and takes optimiser steps on them. What is drawn and shuffled hangs on
the seed and the number of the update alone, never on a random state: a run that goes on from a checkpoint repeats
exactly what it would have done, and several processes do what one does. After each share of the work all ranks hold
the whole rollout (a few numbers a token), so that baselines and whitening are global by themselves.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import get_peft_model
from transformers import Trainer, get_scheduler, set_seed

from suwen import policy_gradient as pg
from suwen.actor_critic import ActorCritic, Reference
from suwen.batches import pack_rows, pad_rows
from suwen.generation_settings import GenerationSettings
from suwen.head import count_chunks
from suwen.interruption import StopSignals
from suwen.lora import fuse_lora
from suwen.models import without_adapter, without_dropout
from suwen.nonfinite import NonFinite
from suwen.packing import pack_best_fit
from suwen.probe import on_device
from suwen.questions import ask
from suwen.rewards import Sample, Weighted, critic_head, require_answer_keys
from suwen.rollout_server import RolloutServer
from suwen.rollouts import Rollout, describe_answers, describe_samples, draw_answers, put_rows, row_of
from suwen.saved_weights import save_compared
from suwen.tables import counted


class PolicyTrainer:
    """Trains `model` on scores of its own answers; `update` is one rollout and the optimiser steps on it."""

    def __init__(
        self,
        *,
        model: Any,
        settings: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        encoder: Any,
        rewards: Sequence[Weighted],
        held_out_rewards: Sequence[Weighted] = (),
        peft_config: Any = None,
        max_length: int = 1024,
        packing: bool = True,
        padding: bool = False,
        pure_bf16: bool = False,
    ) -> None:
        """
        Args:
            settings: see `PolicyArguments`.
            args: transformers' TrainingArguments.
            train_dataset, eval_dataset: rows of `PromptRows`, the latter asked `each_once`; None for no evaluation.
            rewards: what is trained on; the critic begins with the head of a reward model among them.
            held_out_rewards: only measured, at evaluations.
            peft_config: a new adapter to be trained; None to train what requires gradients.
            max_length: tokens in a pack, at most; a longer row is a pack of its own.
        """
        self.settings, self.args, self.encoder = settings, args, encoder
        self.processing_class = encoder.tokenizer
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset and each_once(eval_dataset)
        self.rewards, self.held_out_rewards = list(rewards), list(held_out_rewards)
        self.capacity = max_length if packing and not padding else 0
        self.padding = padding
        check_group_size(args, settings)
        require_answer_keys([*rewards, *held_out_rewards], train_dataset, eval_dataset)
        set_seed(args.seed)  # a new adapter begins with random numbers
        model = get_peft_model(model, peft_config) if peft_config is not None else model
        fuse_lora(model)
        without_dropout(model)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model
        head = critic_head(self.rewards, without_adapter(model).config.get_text_config().hidden_size)
        self.policy = ActorCritic(model, settings.algorithm == "ppo", head)
        self.is_fsdp_enabled = False
        self._prepare(pure_bf16)
        self.reference = Reference(model, new_adapter=peft_config is not None)
        self.kl_coefficient = settings.kl_coef
        self.signals = StopSignals()  # entered by the caller
        self.nonfinite = NonFinite(self.processing_class, Path(args.output_dir), "update")
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.tokens_seen = 0
        self.server: RolloutServer | None = None
        if settings.rollout_server:
            self.server = RolloutServer(settings.rollout_server, Path(args.output_dir) / "rollout_adapters")

    def _prepare(self, pure_bf16: bool) -> None:
        """Optimiser, schedule, precision and engine."""
        args = self.args
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        self.accelerator = Accelerator(
            mixed_precision=precision,
            deepspeed_plugin=args.deepspeed_plugin,
            cpu=args.use_cpu,
            log_with=[name for name in args.report_to if name != "none"] or None,
            project_dir=os.environ.get("TENSORBOARD_LOGGING_DIR", args.output_dir),
        )
        self.is_deepspeed_enabled = args.deepspeed_plugin is not None
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        if not pure_bf16 and not self.is_deepspeed_enabled:
            for parameter in trained:
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
        device = self.accelerator.device
        if self.is_deepspeed_enabled:
            settle_deepspeed(args, without_adapter(self.model))
        elif not getattr(without_adapter(self.model), "is_quantized", False):
            self.policy.to(device)
        elif self.policy.value_head is not None:
            self.policy.value_head.to(device)
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, self.model)
        self.raw_optimizer = optimizer_class(trained, weight_decay=args.weight_decay, **options)
        self.steps_an_update = self.num_epochs * self.settings.num_mini_batches
        total = self.planned_updates() * self.steps_an_update
        self.scheduler = get_scheduler(args.lr_scheduler_type, self.raw_optimizer, args.get_warmup_steps(total), total)
        if self.is_deepspeed_enabled:
            self.engine, self.optimizer = self.accelerator.prepare(self.policy, self.raw_optimizer)
        else:
            self.engine = self.accelerator.prepare_model(self.policy, device_placement=False)
            self.optimizer = self.accelerator.prepare_optimizer(self.raw_optimizer, device_placement=False)

    # Sizes

    @property
    def num_epochs(self) -> int:
        return num_epochs(self.settings)

    @property
    def group_size(self) -> int:
        """Answers to each prompt of an update."""
        return group_size(self.settings)

    @property
    def batch_size(self) -> int:
        """Answers of an update, on all ranks."""
        return batch_size(self.args, self.settings)

    @property
    def num_prompts(self) -> int:
        return self.batch_size // self.group_size

    def planned_updates(self) -> int:
        return planned_updates(self.args, self.settings, len(self.train_dataset))

    # Rollouts

    def rows_of_update(self, step: int) -> list[tuple[int, int]]:
        """(number, epoch) of the rows whose prompts an update asks: the data in a new order in each epoch."""
        size = len(self.train_dataset)
        orders: dict[int, np.ndarray] = {}
        found = []
        for place in range(step * self.num_prompts, (step + 1) * self.num_prompts):
            epoch, at = divmod(place, size)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((self.args.seed, epoch)).permutation(size)
            found.append((int(orders[epoch][at]), epoch))
        return found

    def ask_row(self, dataset: Any, number: int, epoch: int | str) -> tuple[list[dict], Any, list[int]]:
        """Messages, answer key and ids of a prompt, options in the order of this epoch."""
        row = dataset[number]
        rng = random.Random(f"{self.args.seed} {epoch} {number}") if self.settings.shuffle_options else None
        messages, item = ask(json.loads(row["messages"]), row["item"], rng)
        if item is None or rng is None:
            return messages, item, row["prompt_ids"]
        return messages, item, self.encoder.encode_prompt(messages)

    def share(self, count: int) -> list[int]:
        """Places of this rank in a list; ranks get as many, the last place again where they would get fewer."""
        rank, world = self.args.process_index, self.args.world_size
        return [min(place, count - 1) for place in range(rank, -(-count // world) * world, world)]

    def answer(
        self, questions: Sequence[tuple[list[dict], Any, list[int]]], temperature: float, seeds: Sequence[int]
    ) -> list[Sample]:
        """An answer to each question; ranks share the work, all get the whole."""
        mine = self.share(len(questions))
        prompts, chosen = [questions[i][2] for i in mine], [seeds[i] for i in mine]
        drawing = GenerationSettings(self.settings.max_new_tokens, temperature, top_p=1.0)
        training = self.policy.training
        self.policy.eval()
        if self.server is not None:
            conversations = [questions[i][0] for i in mine]
            answers = self.server.draw_answers(self.encoder, conversations, prompts, drawing, chosen)
        else:
            with self.accelerator.autocast():
                answers = draw_answers(
                    self.model, self.encoder, prompts, drawing, chosen, self.settings.generation_batch_size
                )
        self.policy.train(training)
        found = dict(gather_object(list(zip(mine, answers, strict=True))))
        return [Sample(*questions[i], found[i]) for i in range(len(questions))]

    def score(self, samples: list[Sample], rewards: Sequence[Weighted]) -> dict[str, torch.Tensor]:
        """(B,) of each reward; ranks share the work."""
        mine = self.share(len(samples))
        measured = [reward.measure([samples[i] for i in mine]) for reward in rewards]
        found = dict(gather_object([(i, values) for i, *values in zip(mine, *measured, strict=True)]))
        columns = zip(*(found[i] for i in range(len(samples))), strict=True)
        return {
            reward.name: torch.tensor(column, dtype=torch.float64).float()
            for reward, column in zip(rewards, columns, strict=True)
        }

    def draw(self, step: int) -> Rollout:
        """Answers to the prompts of an update, with all that the policy and the reference say of them."""
        if self.server is not None:
            self.server.hand_over(self, step)
        questions = [
            self.ask_row(self.train_dataset, number, epoch)
            for number, epoch in self.rows_of_update(step)
            for _ in range(self.group_size)
        ]
        first = (self.args.seed << 40) + step * self.batch_size
        seeds = [first + place for place in range(len(questions))]
        samples = self.answer(questions, self.settings.temperature, seeds)
        scores = self.score(samples, self.rewards)
        lengths = torch.tensor([len(sample.answer.token_ids) for sample in samples])
        mask = (torch.arange(int(lengths.max().clamp(min=1)))[None] < lengths[:, None]).float()
        logps, entropy, values = self.measure(samples, mask)
        with self.reference():
            reference_logps, _, _ = self.measure(samples, mask)
        return Rollout(samples, scores, mask, logps, entropy, values, reference_logps)

    # Forward passes

    def micro_batches(self, samples: Sequence[Sample], places: Sequence[int]) -> list[tuple[list[int], dict[str, Any]]]:
        """Batches of `places`, this rank's share of the work; the last one again, without places, to be as many."""
        size = self.args.per_device_train_batch_size
        lengths = [len(samples[i].prompt_ids) + len(samples[i].answer.token_ids) for i in places]
        if self.capacity:
            packs = pack_best_fit(lengths, max(self.capacity, *lengths))
            groups = [[places[i] for i in pack] for pack in packs]
        else:
            groups = [list(places[at : at + size]) for at in range(0, len(places), size)]
        largest = max(sum(len(samples[i].answer.token_ids) for i in group) for group in groups)
        plan = self.accelerator.gather(torch.tensor([[len(groups), largest]], device=self.accelerator.device))
        count, largest = plan.max(0).values.tolist()
        num_chunks = count_chunks(without_adapter(self.model), largest)
        found = []
        for number in range(count):
            group = groups[min(number, len(groups) - 1)]
            rows = [row_of(samples[i]) for i in group]
            batch = pad_rows(rows, self.processing_class.pad_token_id) if self.padding else pack_rows(rows)
            batch |= {"num_chunks": num_chunks, "temperature": self.settings.temperature}
            found.append((group if number < len(groups) else [], on_device(batch, self.accelerator.device)))
        return found

    @torch.no_grad()
    def measure(self, samples: Sequence[Sample], mask: torch.Tensor) -> list[torch.Tensor]:
        """(B, T) log-probabilities, entropies and values, 0 on padding; ranks share the work, all get the whole."""
        count, rank, world = len(samples), self.args.process_index, self.args.world_size
        found = torch.zeros(3, *mask.shape, device=self.accelerator.device)
        self.policy.eval()
        for group, batch in self.micro_batches(samples, list(range(rank, count, world))):
            actions = self.engine(**batch)
            for kind, flat in enumerate(actions):
                put_rows(found[kind], group, mask, flat)
        self.policy.train()
        return [part.cpu() for part in self.accelerator.reduce(found, "sum")]

    # An update

    def total_scores(self, samples: Sequence[Sample], scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B,) weighted sum of the rewards, less the penalty where the answer did not end."""
        total = sum((reward.weight * scores[reward.name] for reward in self.rewards), torch.zeros(()))
        cut = torch.tensor([float(sample.answer.finish_reason != "stop") for sample in samples])
        return total - self.settings.missing_eos_penalty * cut

    def estimator(self) -> str:
        return self.settings.kl_estimator or ("k3" if self.settings.algorithm == "grpo" else "k1")

    def credit(self, rollout: Rollout, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) advantages of the tokens, and the returns for the critic."""
        given, mask = self.settings, rollout.mask
        kl = pg.kl_estimate(rollout.logps, rollout.reference_logps, self.estimator())
        if given.algorithm == "ppo":
            rewards = pg.token_rewards(scores, kl, mask, self.kl_coefficient)
            found = pg.advantages(rewards, rollout.values, mask, given.gamma, given.lam)
            returns = found + rollout.values
        else:
            if given.algorithm == "rloo":
                whole = scores - self.kl_coefficient * (kl * mask).sum(1)
                by_answer = pg.leave_one_out(whole.view(-1, self.group_size)).flatten()
            else:  # GRPO's KL is part of the loss
                by_answer = pg.group_relative(scores.view(-1, self.group_size)).flatten()
            found = by_answer[:, None] * mask
            returns = torch.zeros_like(found)
        return pg.whiten(found, mask) if given.whiten_advantages else found, returns

    def loss(
        self, rollout: Rollout, group: list[int], batch: dict[str, Any], advantages: torch.Tensor, returns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch, summed over its tokens, and sums of what is logged of it (see `SUMS`)."""
        given, device = self.settings, self.accelerator.device
        actions = self.engine(**batch)
        if not group:  # repeated only so that this rank makes as many calls as the others
            return sum(part.sum() for part in actions) * 0.0, torch.zeros(len(SUMS), device=device)
        kept = rollout.mask[group].bool()

        def tokens(matrix: torch.Tensor) -> torch.Tensor:
            return matrix[group][kept].to(device)

        old = tokens(rollout.logps)
        policy, clipped = pg.policy_loss(actions.logps, old, tokens(advantages), given.cliprange)
        loss = policy.sum()
        value = torch.zeros_like(policy)
        if given.algorithm == "ppo":
            value, _ = pg.value_loss(actions.values, tokens(rollout.values), tokens(returns), given.cliprange_value)
            loss = loss + given.vf_coef * value.sum()
        if given.entropy_coef:
            loss = loss - given.entropy_coef * actions.entropy.sum()
        if given.algorithm == "grpo":
            kl = pg.kl_estimate(actions.logps, tokens(rollout.reference_logps), self.estimator())
            loss = loss + self.kl_coefficient * kl.sum()
        moved = pg.kl_estimate(old, actions.logps, "k3")
        sums = [loss, policy.sum(), value.sum(), clipped.sum(), moved.sum(), torch.tensor(len(old))]
        return loss, torch.stack([part.detach().float().to(device) for part in sums])

    def update(self) -> dict[str, Any]:
        """Draw, score, and learn from it; what is logged of it."""
        began = time.monotonic()
        rollout = self.draw(self.step)
        drawn = time.monotonic()
        scores = self.total_scores(rollout.samples, rollout.scores)
        advantages, returns = self.credit(rollout, scores)
        sums = torch.zeros(len(SUMS), device=self.accelerator.device)
        norms = []
        for epoch in range(self.num_epochs):
            rng = np.random.default_rng((self.args.seed, self.step, epoch))
            for part in np.array_split(rng.permutation(len(rollout.samples)), self.settings.num_mini_batches):
                found, norm = self.optimiser_step(rollout, part.tolist(), advantages, returns)
                sums += found
                norms.append(norm)
        self.step += 1
        rate = self.scheduler.get_last_lr()[0]
        entry = self.describe(rollout, scores, returns) | {"grad_norm": sum(norms) / len(norms), "learning_rate": rate}
        entry |= {"kl_coefficient": self.kl_coefficient}
        total = dict(zip(SUMS, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        entry |= {name: total[name] / max(total["tokens"], 1) for name in SUMS if name != "tokens"}
        entry |= {"rollout_seconds": drawn - began, "update_seconds": time.monotonic() - drawn}
        if self.settings.target_kl:
            self.kl_coefficient = pg.adapted_coefficient(self.kl_coefficient, entry["kl"], self.settings.target_kl)
        self.tokens_seen += sum(len(s.prompt_ids) + len(s.answer.token_ids) for s in rollout.samples)
        self.last_samples = describe_samples(rollout, scores, self.step)
        return entry

    def optimiser_step(
        self, rollout: Rollout, part: list[int], advantages: torch.Tensor, returns: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """One step on a mini-batch: the loss is a mean over its tokens on all ranks."""
        world, last = self.args.world_size, None
        tokens = rollout.mask[part].sum().clamp(min=1).item()
        batches = self.micro_batches(rollout.samples, part[self.args.process_index :: world])
        sums = torch.zeros(len(SUMS), device=self.accelerator.device)
        for number, (group, batch) in enumerate(batches):
            last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps in the last backward pass
            wait = not last and not self.is_deepspeed_enabled
            with self.accelerator.no_sync(self.engine) if wait else nullcontext():
                loss, found = self.loss(rollout, group, batch, advantages, returns)
                # Ranks' gradients are averaged, the loss is divided by the tokens of all of them
                self.accelerator.backward(loss * world / tokens)
            if group:
                self.nonfinite.note(loss, batch)
            if self.nonfinite.action == "skip":
                found = torch.where(torch.isfinite(loss.detach()), found, 0.0)
            sums += found
        if self.is_deepspeed_enabled:
            norm = self.engine.get_global_grad_norm() or 0.0
        else:
            norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.args.max_grad_norm or math.inf)
        norm = float(norm)
        if self.nonfinite.found(norm, self.step + 1, self.args.fp16, world):
            self.policy.zero_grad(set_to_none=True)  # the optimiser passes over parameters without a gradient
        norm = norm if math.isfinite(norm) else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return sums, norm

    # What is logged

    def describe(self, rollout: Rollout, scores: torch.Tensor, returns: torch.Tensor) -> dict[str, Any]:
        mask = rollout.mask
        difference = (rollout.logps - rollout.reference_logps) * mask
        entry = {"score": scores.mean().item()}
        entry |= {f"score/{name}": values.mean().item() for name, values in rollout.scores.items()}
        entry |= {
            "kl": difference.sum(1).mean().item(),
            "entropy": pg.masked_mean(rollout.entropy, mask).item(),
        } | describe_answers(rollout.samples)
        if self.settings.algorithm == "ppo":
            entry["explained_variance"] = pg.explained_variance(rollout.values, returns, mask)
        return entry

    def evaluate(self) -> dict[str, float]:
        """Scores of the likeliest answers to the held-out prompts, the same ones each time."""
        began = time.monotonic()
        if self.server is not None:
            self.server.hand_over(self, self.step)
        questions = [self.ask_row(self.eval_dataset, i, "held out") for i in range(len(self.eval_dataset))]
        samples = self.answer(questions, 0.0, [0] * len(questions))
        scores = self.score(samples, self.rewards)
        total = self.total_scores(samples, scores)
        entry = {"eval_score": total.mean().item()}
        entry |= {f"eval_score/{name}": values.mean().item() for name, values in scores.items()}
        if self.held_out_rewards:
            held = self.score(samples, self.held_out_rewards)
            entry["eval_held_out_reward"] = sum(r.weight * held[r.name].mean().item() for r in self.held_out_rewards)
            scores |= held
        entry |= {f"eval_{name}": value for name, value in describe_answers(samples).items()}
        self.last_evaluation = [
            {"step": self.step, "prompt": number, "answer": sample.answer.content, "score": score}
            | {"scores": {name: values[number].item() for name, values in scores.items()}}
            for number, (sample, score) in enumerate(zip(samples, total.tolist(), strict=True))
        ]
        return entry | {"eval_runtime": time.monotonic() - began}

    def save_model(self, output: str) -> None:
        """The language model or its adapter, as any stage saves it, read back and compared; every rank takes part."""
        weights = None
        if self.is_deepspeed_enabled:
            whole = self.accelerator.get_state_dict(self.engine)
            if self.accelerator.is_main_process:
                weights = {k.removeprefix("model."): v for k, v in whole.items() if k.startswith("model.")}
        if self.accelerator.is_main_process:
            save_compared(self.model, Path(output), weights)
        self.accelerator.wait_for_everyone()


# Sizes, as they follow from the flags alone


def num_epochs(given: Any) -> int:
    return given.num_ppo_epochs or (4 if given.algorithm == "ppo" else 1)


def group_size(given: Any) -> int:
    return given.num_generations or {"ppo": 1, "rloo": 4, "grpo": 8}[given.algorithm]


def batch_size(args: Any, given: Any) -> int:
    return (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * given.num_mini_batches * args.world_size
    )


def check_group_size(args: Any, given: Any) -> None:
    """Refuse an update that does not hold whole groups of answers."""
    if batch_size(args, given) % group_size(given):
        raise ValueError(
            f"--num_generations: found {group_size(given)}, expected a divisor of {batch_size(args, given)}, the"
            " answers of an update (per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches x"
            " processes)"
        )


def planned_updates(args: Any, given: Any, num_rows: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    if given.total_episodes:
        return math.ceil(given.total_episodes / batch_size(args, given))
    return math.ceil(args.num_train_epochs * num_rows / (batch_size(args, given) // group_size(given)))


def describe_updates(args: Any, given: Any, num_rows: int) -> str:
    """How many updates there are, and of what; refuses what `PolicyTrainer` would."""
    check_group_size(args, given)
    answers, steps = batch_size(args, given), num_epochs(given) * given.num_mini_batches
    return (
        f"{given.algorithm}: {counted(planned_updates(args, given, num_rows), 'update')}, each of "
        f"{counted(answers, 'answer')} to {counted(answers // group_size(given), 'prompt')} and "
        f"{counted(steps, 'optimiser step')}"
    )


def each_once(rows: Any) -> Any:
    """The first row of each prompt and answer key: several pairs of one prompt do not make it count as often."""
    first: dict[str, int] = {}
    for number, (messages, item) in enumerate(zip(rows["messages"], rows["item"], strict=True)):
        first.setdefault(json.dumps([messages, item]), number)
    return rows.select(list(first.values()))


SUMS = ("loss", "policy_loss", "value_loss", "clip_fraction", "policy_moved", "tokens")


def settle_deepspeed(args: Any, model: Any) -> None:
    """Fill in what DeepSpeed's configuration leaves open. Accumulation is ours: micro-batches are as many as packs."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    plugin = args.deepspeed_plugin
    if getattr(args, "hf_deepspeed_config", None) is None:  # given by the launcher, not by --deepspeed
        args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    args.hf_deepspeed_config.trainer_config_process(args)
    args.hf_deepspeed_config.trainer_config_finalize(args, model, 1)
    values = args.hf_deepspeed_config.config
    values |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    values |= {"train_batch_size": args.world_size, "gradient_clipping": args.max_grad_norm}
    if values["zero_optimization"]["stage"] == 3:
        # All weights are partitioned alike, so that those of the reference can be swapped in
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    plugin.hf_ds_config.config = plugin.deepspeed_config = values
