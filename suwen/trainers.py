"""The training loops of the stages: transformers' Trainer on packed rows, scored without logits."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from accelerate.utils import save_fsdp_optimizer
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from tqdm import tqdm
from transformers import Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from suwen.batches import PAIR_COLUMNS, collate_ends, collate_pairs, collate_rows
from suwen.cache import read_array, write_array
from suwen.checkpoint import Saves, named_step
from suwen.interruption import StopSignals
from suwen.lineage import read_json
from suwen.lora import fuse_lora
from suwen.models import without_adapter, without_dropout
from suwen.neftune import EmbeddingNoise
from suwen.nonfinite import NonFinite, require_finite_evaluation, require_finite_weights
from suwen.packing import BalancedSampler, Packs, pack_best_fit
from suwen.preference import PairLogps, bradley_terry_loss, log_odds, odds_ratio_loss, preference_loss, sum_by_answer
from suwen.probe import gathered_module_by_module
from suwen.progress import say
from suwen.records import write_json
from suwen.resuming import find_damage_once, from_main
from suwen.saved_weights import load_saved, require_saved, save_compared, state_bytes, taken_up

UNLOGGED = "unlogged.json"  # in a checkpoint: what the next log line will be made of


def num_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch that are no padding."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def row_lengths(rows: Any, columns: Sequence[str]) -> np.ndarray:
    """(rows,) tokens in these list columns together, from the file's offsets: the tokens themselves are not read."""
    lengths: np.ndarray = np.zeros(len(rows), dtype=np.int64)
    start = 0
    for table in rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000):
        for column in columns:
            found = pyarrow.compute.list_value_length(table.column(column)).to_numpy()
            lengths[start : start + table.num_rows] += found
        start += table.num_rows
    return lengths


def best_saved_step(state: Any) -> int | None:
    """Step of the best checkpoint: an evaluation that is better may be of a step without one; None where none was."""
    if state.best_model_checkpoint:
        return named_step(Path(state.best_model_checkpoint))
    return state.best_global_step  # the library forgets a path that is no longer there


class PackedTrainer(Trainer):
    """Trains on packs of rows; the loss is a mean over all items of an optimiser step, on all ranks.

    A subclass says how long a row is, how packs become a batch, what the items are, and what is measured of a batch.

    Attributes:
        about: what the manifests of checkpoints say of the run.
        signals: entered by the caller, a signal ends the training at its next step, with a checkpoint.
        nonfinite: what is done at a loss or gradient that is no number.
    """

    length_columns: tuple[str, ...]  # a row is as long as these together
    collate: Callable[..., dict[str, Any]]
    run_dir: str | None = None  # where a checkpoint is being written
    weights_of: str | None = None  # with --load_best_model_at_end: what the weights at the end are, as a phrase
    best_step: int | None = None  # whose weights they are then
    resumed_from: Path | None = None  # until its state is taken up

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        max_length: int,
        packing: bool = True,
        padding: bool = False,
        peft_config: LoraConfig | None = None,
        pure_bf16: bool = False,
    ) -> None:
        """
        Args:
            train_dataset, eval_dataset: encoded rows; None for no evaluation.
            max_length: tokens in a pack, at most; a single longer row is a pack of its own.
            packing: several rows in a sequence.
            padding: rows side by side instead of one behind another, for models that cannot keep them apart.
            peft_config: a new adapter to be trained; None to train what requires gradients.
            pure_bf16: leave weights in training in 16 bit; else they are float32, under DeepSpeed by its masters.
        """
        set_seed(args.seed)  # a new adapter or head starts from the same numbers each time
        model = get_peft_model(model, peft_config) if peft_config is not None else model
        fuse_lora(model)
        args.remove_unused_columns = False
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        capacity = max_length if packing and not padding else 0
        at_once = args.per_device_eval_batch_size  # rows or packs, joined to one pack: these are counted one by one
        args.per_device_eval_batch_size = 1
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(type(self).collate, pad_token_id=processing_class.pad_token_id if padding else None),
            train_dataset=self.packs(train_dataset, capacity),
            eval_dataset=self.packs(eval_dataset, capacity * at_once, at_once) if eval_dataset is not None else None,
            processing_class=processing_class,
        )
        if not pure_bf16 and not self.is_deepspeed_enabled:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()
        self.loss_is_scaled_for_ga = True
        config = without_adapter(self.model).config.get_text_config()
        self.router_coefficient = getattr(config, "router_aux_loss_coef", None) or 0.0
        self.router_loss: torch.Tensor | None = None
        self.neftune_noise_alpha = None  # the library's noise, which knows no packed rows
        self.noise = None
        if args.neftune_noise_alpha:
            self.noise = EmbeddingNoise(self.model.get_input_embeddings(), args.neftune_noise_alpha)
        self.sums: dict[str, torch.Tensor] = {}
        self.about: dict[str, Any] = {}
        self.signals = StopSignals()
        self.stop_agreed = False
        self.nonfinite = NonFinite(processing_class, Path(args.output_dir))
        self.saves = Saves(Path(args.output_dir), args.process_index == 0, self.accelerator.wait_for_everyone)

    @classmethod
    def packs(cls, rows: Any, capacity: int, at_once: int = 1) -> Packs:
        """Packs of up to `capacity` tokens; without a capacity `at_once` rows of about the same length."""
        began = time.monotonic()
        lengths = row_lengths(rows, cls.length_columns)
        if not capacity:
            order = np.argsort(lengths, kind="stable") if at_once > 1 else np.arange(len(rows))
            return Packs(rows, np.split(order, range(at_once, len(rows), at_once)), lengths)
        groups = pack_best_fit(lengths, max(capacity, int(lengths.max(initial=0))))
        return Packs(rows, groups, lengths, time.monotonic() - began)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        group = self.args.per_device_train_batch_size * self.args.world_size
        return BalancedSampler((train_dataset or self.train_dataset).costs, group, seed)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        items = sum(self.num_items(batch) for batch in batch_samples)
        tokens = sum(num_tokens(batch) for batch in batch_samples)
        if self.args.world_size > 1:  # a signal reaches the ranks at different steps; all stop after the same one
            mine = torch.tensor([[items, tokens, self.signals.received]], device=device)
            items, tokens, stop = self.accelerator.gather(mine).sum(0).tolist()
            self.stop_agreed = bool(stop)
        self.state.num_input_tokens_seen += tokens
        return torch.tensor(max(items, 1), device=device)

    def num_items(self, batch: dict[str, Any]) -> int:
        """What the loss of a batch is a mean of."""
        return int(batch["score_labels"].numel())

    def measure(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss summed over the items of a batch, and sums for its metrics."""
        raise NotImplementedError

    def call(self, model: Any, batch: dict[str, Any]) -> Any:
        """What the model says of a batch; the loss of its routers, where it has one, is kept for `compute_loss`."""
        if self.noise is not None:
            self.noise.rows(batch)
        output = model(**batch)
        self.router_loss = output.router_loss
        return output

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics from sums over many batches."""
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss, sums = self.measure(model, inputs)
        if self.router_loss is not None:  # a mean: counts as often as the batch has items
            items = self.num_items(inputs)
            loss = loss + self.router_coefficient * self.router_loss * items
            sums |= {"router_loss": self.router_loss * items, "router_items": loss.new_full((), items)}
        self.nonfinite.note(loss, inputs)
        for name, value in sums.items():
            value = value.detach().double()
            if self.nonfinite.action == "skip":
                value = torch.where(torch.isfinite(loss.detach()), value, 0.0)
            self.sums[name] = self.sums.get(name, 0) + value
        # Ranks' gradients are averaged, the loss is divided by the items of all of them
        return loss * self.accelerator.num_processes / num_items_in_batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.sums:
            sums = self.gathered(self.sums)
            if router_items := sums.pop("router_items", 0):
                logs["router_loss"] = sums.pop("router_loss") / router_items
            logs |= self.metrics(sums) | {"num_tokens": self.state.num_input_tokens_seen}
            self.sums = {}
        super().log(logs, *args, **kwargs)

    def gathered(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        values = self.accelerator.gather(torch.stack(list(sums.values()))[None]).sum(0)
        return dict(zip(sums, values.tolist(), strict=True))

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, sums = self.measure(model, inputs)
        # One line a batch, so that gather_for_metrics can drop the copies that fill the last distributed batch
        values = torch.stack([value.double() for value in sums.values()])
        self.evaluated.append(self.accelerator.gather_for_metrics(values[None]))
        self.evaluated_names = list(sums)
        return loss.detach().float() / max(self.num_items(inputs), 1), None, None

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.evaluated: list[torch.Tensor] = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        values = torch.cat(self.evaluated).sum(0).tolist()
        found = self.metrics(dict(zip(self.evaluated_names, values, strict=True)))
        require_finite_evaluation(found["loss"], self.state.global_step)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        return torch.where(torch.isfinite(loss), loss, 0.0) if self.nonfinite.action == "skip" else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once an optimiser step, before the optimiser's own; under DeepSpeed after it
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # float16 is scaled everywhere, by accelerate or by DeepSpeed's engine
        if self.nonfinite.found(norm, self.state.global_step + 1, self.args.fp16, self.args.world_size):
            model.zero_grad(set_to_none=True)  # the optimiser passes over parameters without a gradient
            return 0.0
        return norm

    @property
    def stopped(self) -> bool:
        """Whether a signal ends the training; the same on every rank."""
        return self.stop_agreed or (self.args.world_size == 1 and bool(self.signals.received))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.stopped:
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return self.run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """What the library writes, into a folder aside that is published when it is whole."""
        require_finite_weights(self)
        output, step, state = Path(self.args.output_dir), self.state.global_step, self.state
        unlogged = {
            "sums": self.gathered(self.sums) if self.sums else {},
            "loss": self.accelerator.gather(self._tr_loss[None]).mean().item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "skipped_steps": self.nonfinite.skipped,
        }

        def write(folder: Path) -> None:
            self.run_dir = str(folder.parent)
            checksums = torch.serialization.get_crc32_options()
            torch.serialization.set_crc32_options(False)  # the manifest's are better
            try:
                super(PackedTrainer, self)._save_checkpoint(model, trial)
            finally:
                self.run_dir = None
                torch.serialization.set_crc32_options(checksums)
            if not self.args.should_save:
                return
            best = output / f"checkpoint-{state.best_global_step}"
            if state.best_global_step == step or best.is_dir():
                state.best_model_checkpoint = str(best)
            state.save_to_json(str(folder / "trainer_state.json"))  # again: the library wrote the path that it saw
            write_json(folder / UNLOGGED, unlogged)

        self.saves.save(
            step,
            write,
            self.about,
            needed_bytes=state_bytes(self.model, self.optimizer, self.is_deepspeed_enabled),
            limit=self.args.save_total_limit,
            keep=[step if state.best_global_step == step else best_saved_step(state) or 0],
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Weights and tokenizer, read back and compared; not training_args.bin, which is a pickle that nobody reads."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            # A checkpoint holds weights by their live names; the library would give experts other ones, and not know
            # these when the run goes on
            names = {"save_original_format": False} if self.run_dir and not isinstance(model, PeftModel) else {}
            save_compared(model, folder, state_dict, **names)
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Without FSDP's own copy of the weights, a pickle
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """All weights of a checkpoint; the library passes over those whose names it does not know."""
        folder = Path(resume_from_checkpoint)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not self.is_fsdp_enabled:
            load_saved(model, folder)
            return
        found = self.accelerator.get_state_dict(self.model)  # whole on the first rank, empty on the others
        if self.args.should_save:
            load_saved(model, folder, found)
        set_model_state_dict(
            model, found, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        if f"eval_{name}" not in metrics:
            known = ", ".join(key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
            raise ValueError(f"--metric_for_best_model: found {name}, expected one of {known}")
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        """The best evaluation's weights, where their checkpoint is whole; else those of the last step stay."""
        step = best_saved_step(self.state)
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        problem = find_damage_once(best) if step else "no evaluation was compared"
        if problem:
            which = f" ({best.name})" if step else ""
            self.weights_of = f"the last step, as the best checkpoint{which} cannot be used: {problem}"
            say(f"note: --load_best_model_at_end: the weights are those of {self.weights_of}")
            return
        self.state.best_model_checkpoint = str(best)  # as the library stored it, it may be another folder's
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best))
        self.weights_of, self.best_step = f"{best.name}, the best evaluation", step

    def go_on(self) -> None:
        """Take up what had been computed, but not logged, before a checkpoint; the library has set it to nothing."""
        if self.resumed_from is None:
            return
        if self.is_deepspeed_enabled:  # with an adapter the engine passes over weights that it does not find
            found = self.accelerator.get_state_dict(self.deepspeed)
            if self.args.should_save:
                with taken_up(self.resumed_from):
                    require_saved(self.accelerator.unwrap_model(self.model), self.resumed_from, found)
        found, self.resumed_from = read_json(self.resumed_from / UNLOGGED), None
        first = self.args.process_index == 0  # sums are over all ranks
        device = self.args.device
        self.sums = {
            name: torch.tensor(value if first else 0.0, dtype=torch.float64, device=device)
            for name, value in found["sums"].items()
        }
        self._tr_loss = torch.tensor(found["loss"], device=device)
        self._total_loss_scalar, self._globalstep_last_logged = found["logged_loss"], found["logged_step"]
        self.nonfinite.skipped = found["skipped_steps"]

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.saves.finish()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.go_on()  # where no epoch was left
        self.stop_agreed = self.signals.agreed() > 0  # one may have come behind the last step, to some ranks
        if self.stop_agreed:
            self._save_checkpoint(self.model_wrapped, None)  # unless this step is saved already
        self.saves.finish()  # the best checkpoint may be loaded now
        self.saves.wait()  # a rank that left would have the launcher end the one that publishes
        limit, best = self.args.save_total_limit, self.args.load_best_model_at_end
        if best and not self.stopped:
            self._load_best_model()
        # The library would load the best as it is, and with a limit of 1 delete all others, from which a run goes on
        self.args.save_total_limit, self.args.load_best_model_at_end = None, False
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, best

    def evaluate_result(self) -> dict[str, float]:
        """What the held-out rows say of the weights at the end; it may have been logged at their step already."""
        step = self.best_step or self.state.global_step
        logged = [entry for entry in self.state.log_history if "eval_loss" in entry and entry["step"] == step]
        return logged[-1] if logged else self.evaluate()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.go_on()
        # A checkpoint of the last step leaves nothing to train: the library would take one step more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


class LanguageModelTrainer(PackedTrainer):
    """Next-token training on rows of input_ids and labels; the loss is a mean over trained tokens."""

    length_columns = ("input_ids",)
    collate = staticmethod(collate_rows)

    def measure(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scored = self.call(model, batch)
        loss = -scored.logps.sum()
        tokens = loss.new_full((), scored.logps.numel())  # not torch.tensor, which has a GPU catch up
        return loss, {"nll": loss, "correct": scored.correct.sum(), "tokens": tokens}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        tokens = max(sums["tokens"], 1)
        loss = sums["nll"] / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": sums["correct"] / tokens}


class PairTrainer(PackedTrainer):
    """DPO and its relatives on rows of prompt_ids, chosen_ids and rejected_ids; the loss is a mean over pairs.

    The reference is the model as it is before the first step. Its log-probabilities are computed once, by
    `compute_reference`, so there is never a second model or a second adapter in memory.
    """

    length_columns = PAIR_COLUMNS
    collate = staticmethod(collate_pairs)

    def __init__(self, *, settings: Any, **kwargs: Any) -> None:
        """`settings`: beta, loss_type, label_smoothing and sft_weight, see `suwen.preference.preference_loss`."""
        self.settings = settings
        super().__init__(**kwargs)
        without_dropout(self.model)

    def num_items(self, batch: dict[str, Any]) -> int:
        return batch["num_pairs"]

    def measure(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = dict(batch)
        reference = PairLogps(*batch.pop("reference_logps").unbind(1))
        policy, lengths = self.pair_logps(model, batch)
        given = self.settings
        losses = preference_loss(policy, reference, lengths, given.beta, given.loss_type, given.label_smoothing)
        if given.sft_weight:
            losses = losses - given.sft_weight * policy.chosen / lengths.chosen
        chosen = given.beta * (policy.chosen - reference.chosen).detach()
        rejected = given.beta * (policy.rejected - reference.rejected).detach()
        return losses.sum(), {
            "pairs": losses.new_full((), len(losses)),
            "loss": losses.detach().sum(),
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "logps/chosen": policy.chosen.detach().sum(),
            "logps/chosen_change": ((policy.chosen - reference.chosen) / lengths.chosen).detach().sum(),
            "logps/rejected": policy.rejected.detach().sum(),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {name: value / max(sums["pairs"], 1) for name, value in sums.items() if name != "pairs"}

    def pair_logps(self, model: Any, batch: dict[str, Any]) -> tuple[PairLogps, PairLogps]:
        owners, num_pairs = batch.pop("owners"), batch.pop("num_pairs")
        return sum_by_answer(self.call(model, batch).logps, owners, num_pairs)

    def compute_reference(self, cache_dir: Path, key: str) -> None:
        """Log-probabilities of answers under the model as it is now, kept for the training; from the disk if there.

        Only of answers that the training will reach: with --max_steps below an epoch, those of others are NaN.

        Args:
            key: everything that decides them: data, model, lengths, precision.
        """
        for name in ("train_dataset", "eval_dataset"):
            if (packs := getattr(self, name)) is None:
                continue
            reached = self.reached_packs() if name == "train_dataset" else range(len(packs))
            numbers = hashlib.sha256(
                b"".join(packs.packs[at].astype(np.int64).tobytes() + b";" for at in reached)
            ).hexdigest()
            file = cache_dir / f"reference-{hashlib.sha256(f'{key} {name} {numbers}'.encode()).hexdigest()[:24]}.logps"
            first = self.args.process_index == 0
            found = from_main([read_array(file) if first else None])  # all ranks must agree on whether it is there
            if found is None:
                found = self.reference_logps(packs, reached, name.removesuffix("_dataset"))
                if first:
                    write_array(file, found)
            packs.rows = packs.rows.add_column("reference_logps", list(found.astype(np.float32)))
        self.accelerator.wait_for_everyone()

    def reached_packs(self) -> Sequence[int]:
        """Numbers of the packs that are trained, ascending."""
        every = range(len(self.train_dataset))
        per_step = self.args.per_device_train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        if not 0 < self.args.max_steps * per_step < len(every):
            return every
        return sorted(islice(self._get_train_sampler(), self.args.max_steps * per_step))

    @torch.no_grad()
    def reference_logps(self, packs: Packs, reached: Sequence[int], title: str) -> np.ndarray:
        """(rows, 2) log-probabilities of the better and the worse answer, in the precision of the training."""
        rank, world, device = self.args.process_index, self.args.world_size, self.args.device
        if not is_deepspeed_zero3_enabled() and not getattr(self.model, "is_quantized", False):
            self.model.to(device)
        self.model.eval()
        found = torch.zeros(len(packs.rows), 2, dtype=torch.float64, device=device)
        autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        gather = gathered_module_by_module(self.model) if is_deepspeed_zero3_enabled() else nullcontext()
        with gather, torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            # Ranks take turns; under ZeRO-3 all must make the same number of calls, so some repeat the last pack
            steps = range(rank, -(-len(reached) // world) * world, world)
            for number in tqdm(steps, desc=f"reference ({title})", disable=rank > 0 or self.args.disable_tqdm):
                at = reached[min(number, len(reached) - 1)]
                batch = self._prepare_inputs(self.data_collator([packs[at]]))
                policy, _ = self.pair_logps(self.model, batch)
                if number < len(reached):
                    found[packs.packs[at]] = torch.stack(policy, dim=1).double()
        if world > 1:
            torch.distributed.all_reduce(found)
        if left := set(range(len(packs))) - set(reached):
            found[np.concatenate([packs.packs[at] for at in left])] = math.nan
        return found.cpu().numpy()


class OddsRatioTrainer(PairTrainer):
    """ORPO: the better answer's own loss and the odds ratio against the worse one, without a reference.

    Hong et al. 2024 (arXiv:2403.07691), eq. 6; both terms average over the tokens of an answer, stop token included,
    then over pairs.
    """

    def measure(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sums, lengths = self.pair_logps(model, dict(batch))
        mean = PairLogps(sums.chosen / lengths.chosen, sums.rejected / lengths.rejected)
        losses = self.settings.orpo_lambda * odds_ratio_loss(mean) - mean.chosen
        chosen, rejected = log_odds(mean.chosen.detach()), log_odds(mean.rejected.detach())
        return losses.sum(), {
            "pairs": losses.new_full((), len(losses)),
            "loss": losses.detach().sum(),
            "nll": -mean.chosen.detach().sum(),
            "accuracy": (chosen > rejected).sum(),
            "log_odds_ratio": (chosen - rejected).sum(),
        }


class RewardTrainer(PackedTrainer):
    """A reward model on rows of prompt_ids, chosen_ids and rejected_ids; the loss is a mean over pairs.

    Attributes:
        held_out_scores: (rows, 2) of the better and the worse answers in the last evaluation; None before the first.
    """

    length_columns = PAIR_COLUMNS
    collate = staticmethod(collate_ends)

    def __init__(self, *, settings: Any, **kwargs: Any) -> None:
        """`settings`: margin_scale and centering, see `suwen.preference.bradley_terry_loss`."""
        self.settings = settings
        self.held_out_scores: np.ndarray | None = None
        super().__init__(**kwargs)
        if self.eval_dataset is not None:
            numbered = self.eval_dataset.rows.add_column("number", np.arange(len(self.eval_dataset.rows)))
            self.eval_dataset.rows = numbered

    def num_items(self, batch: dict[str, Any]) -> int:
        return len(batch["margins"])

    def measure(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = dict(batch)
        margins, numbers = batch.pop("margins"), batch.pop("numbers")
        scores = self.call(model, batch).scores
        chosen, rejected = scores.view(-1, 2).unbind(1)
        losses = bradley_terry_loss(chosen, rejected, self.settings.margin_scale * margins, self.settings.centering)
        self.measured = torch.stack([numbers, chosen.detach(), rejected.detach()], dim=1)
        scores, ahead = scores.detach(), (chosen - rejected).detach()
        return losses.sum(), {
            "pairs": losses.new_full((), len(losses)),
            "loss": losses.detach().sum(),
            "accuracy": (ahead > 0).sum(),
            "margin": ahead.sum(),
            "score_mean": scores.sum() / 2,
            "squares": (scores.double() ** 2).sum() / 2,
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        found = {name: value / max(sums["pairs"], 1) for name, value in sums.items() if name != "pairs"}
        found["score_std"] = math.sqrt(max(found.pop("squares") - found["score_mean"] ** 2, 0))
        return found

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().prediction_step(model, inputs, *args, **kwargs)
        self.scored.append(self.accelerator.gather(self.accelerator.pad_across_processes(self.measured, pad_index=-1)))
        return output

    def evaluate_result(self) -> dict[str, float]:
        found = super().evaluate_result()
        if self.held_out_scores is None or self.best_step not in (None, self.state.global_step):
            self.evaluation_loop(self.get_eval_dataloader(), "scores")  # of a logged evaluation only the last is known
        return found

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.scored: list[torch.Tensor] = []
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        numbers, *scores = torch.cat(self.scored).double().cpu().numpy().T
        known = numbers >= 0  # not the filling of shorter batches; copies of a pair fall on one another
        self.held_out_scores = np.zeros((len(dataloader.dataset.rows), 2))
        self.held_out_scores[numbers[known].astype(int)] = np.stack(scores, axis=1)[known]
        return output
