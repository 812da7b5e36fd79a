"""TRL's trainers on rows that our encoder has already turned into ids."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer, SFTTrainer


class Float32Training(Trainer):
    """Keeps what is trained in float32, and never goes past the last step.

    TRL casts QLoRA adapters to bfloat16, where small updates are lost. DeepSpeed keeps float32 masters of its own and
    wants one dtype per model, so nothing is changed there.
    """

    def __init__(self, *, model: Any, pure_bf16: bool = False, **kwargs: Any) -> None:
        # An adapter that goes on training must start as it is, not rounded to bfloat16
        given = {
            name: p.data.clone()
            for name, p in model.named_parameters()
            if isinstance(model, PeftModel) and p.requires_grad and p.dtype == torch.float32
        }
        super().__init__(model=model, **kwargs)
        if pure_bf16 or self.is_deepspeed_enabled:
            return
        for name, p in self.model.named_parameters():
            if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16):
                p.data = given[name].to(p.device) if name in given else p.data.float()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of the last step leaves nothing to train: the library would take one step more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


class LanguageModelTrainer(Float32Training, SFTTrainer):
    """Next-token training on rows of input_ids and labels; evaluation averages over tokens, not over batches."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums: list[torch.Tensor] = []

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        # One line a sequence, so that gather_for_metrics can drop the copies that fill the last distributed batch.
        sums = [x.detach().double().sum(dim=-1) for x in (-outputs.log_probs, outputs.label_mask, outputs.is_top1)]
        self._sums.append(self.accelerator.gather_for_metrics(torch.stack(sums, dim=-1)))
        loss = sums[0].sum() / sums[1].sum().clamp(min=1)
        return loss.float(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, tokens, correct = torch.cat(self._sums).sum(dim=0).tolist()
        loss = nll / max(tokens, 1)
        output.metrics.update(
            {
                f"{metric_key_prefix}_loss": loss,
                f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),
                f"{metric_key_prefix}_token_accuracy": correct / max(tokens, 1),
            }
        )
        return output


class PreferenceTrainer(Float32Training, DPOTrainer):
    """DPO (Rafailov et al. 2023, arXiv:2305.18290) on rows of prompt_ids, chosen_ids and rejected_ids."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset
