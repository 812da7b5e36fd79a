"""Rows packed into one sequence, and the check that the model really keeps them apart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


@contextmanager
def gathered_module_by_module(model: Any) -> Iterator[None]:
    """Under ZeRO-3, before the engine exists: gather each module's own weights for the time of its forward pass."""
    import deepspeed

    opened: dict[Any, Any] = {}

    def gather(module: Any, inputs: Any) -> None:
        opened[module] = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        opened[module].__enter__()

    def release(module: Any, inputs: Any, output: Any) -> None:
        opened.pop(module).__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles += [module.register_forward_pre_hook(gather), module.register_forward_hook(release)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def document_influence(
    model: Any, vocabulary_size: int, length: int = 24, autocast: torch.dtype | None = None
) -> float:
    """How far another first document moves the logits of the second one in the same packed sequence.

    The batch is built by the collator that training uses: positions restart, no attention mask, no cache.

    Args:
        autocast: precision of the training, where it runs in mixed precision.

    Returns:
        Largest change of a logit, as a fraction of the logits' standard deviation. 0 where documents are isolated;
        models without position_ids (ALiBi) or with linear attention come out far above.
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    generator = torch.Generator().manual_seed(0)
    first, other, second = (
        torch.randint(0, vocabulary_size, (length,), generator=generator).tolist() for _ in range(3)
    )
    device = model.device
    training = model.training
    model.eval()
    logits = []
    for start in (first, other):
        batch = collate([{"input_ids": start + second, "seq_lengths": [length, length]}])
        batch.pop("labels")
        batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        gather = gathered_module_by_module(model) if is_deepspeed_zero3_enabled() else nullcontext()
        with gather, torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits.append(model(**batch, use_cache=False).logits[0, length:].float())
    model.train(training)
    spread = logits[0].std().clamp(min=1e-6)
    return ((logits[0] - logits[1]).abs().max() / spread).item()


# Exact isolation gives 0; LLM.int8 chooses its outlier columns over the whole batch, which moves logits by about 0.01.
INFLUENCE_LIMIT = 0.1


def packing_problem(model: Any, vocabulary_size: int, config: Any) -> str | None:
    """Why this model cannot be trained on packed rows, or None; the same answer on every rank.

    Args:
        config: the trainer's configuration; the probe runs on its device and in its precision.
    """
    problem = None
    placed = is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if not placed and not getattr(model, "is_quantized", False):
        model.to(config.device)  # the trainer would do it a moment later
    autocast = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    try:
        influence = document_influence(model, vocabulary_size, autocast=autocast)
        if influence > INFLUENCE_LIMIT or influence != influence:
            problem = f"in one sequence a document moves the next one's logits by {influence:.2g} of their spread"
    except (TypeError, RuntimeError, NotImplementedError, IndexError) as error:
        problem = f"the two-document probe failed ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    if torch.distributed.is_initialized():
        answer = [problem]  # under FSDP only the first rank holds the weights
        torch.distributed.broadcast_object_list(answer, src=0)
        problem = answer[0]
    return problem
