"""What is tried out on the loaded model before it is trained: does it keep packed rows apart?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from suwen.batches import Batch, pack_pairs, pack_rows, pad_pairs, pad_rows
from suwen.encoding import IGNORE_INDEX

# Exact isolation differs by rounding: 1e-6 in float32, below 0.03 in bfloat16. LLM.int8 chooses its outlier columns
# over the whole batch, which moves log-probabilities by about 0.01.
DIFFERENCE_LIMIT = 0.1


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


def random_rows(vocabulary_size: int) -> list[dict[str, Any]]:
    """Three rows of random tokens; a model that mixes rows answers them differently together and alone."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary_size, (length,), generator=generator).tolist() for length in (24, 9, 17)]
    return [{"input_ids": ids, "labels": [IGNORE_INDEX] * 3 + ids[3:]} for ids in rows]


def random_pairs(vocabulary_size: int) -> list[dict[str, Any]]:
    """Two preference pairs of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(vocabulary_size, (length,), generator=generator).tolist()

    lengths = ((12, 9, 5), (7, 4, 11))
    return [{"prompt_ids": tokens(p), "chosen_ids": tokens(c), "rejected_ids": tokens(r)} for p, c, r in lengths]


@torch.no_grad()
def packing_difference(model: Any, items: list[Any], pack: Callable, pad: Callable, config: Any) -> float:
    """How far log-probabilities move when rows are packed instead of computed side by side.

    Args:
        model: with a scoring head, or a reward model.
        pack, pad: from items to a packed batch, and to a padded one whose rows cannot see one another.
        config: the trainer's; its device and precision are those of the comparison.

    Returns:
        Largest change, as a fraction of the log-probabilities' standard deviation.
    """
    autocast = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    training = model.training
    model.eval()
    found = []
    for batch in (pack(items), pad(items, 0)):
        gather = gathered_module_by_module(model) if is_deepspeed_zero3_enabled() else nullcontext()
        with gather, torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
            found.append(model(**on_device(batch, model.device))[0])  # log-probabilities, or a reward model's scores
    model.train(training)
    return ((found[0] - found[1]).abs().max() / found[1].std().clamp(min=1e-6)).item()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The part of a batch that a model takes, on its device."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in ("owners", "num_pairs", "reference_logps")
    }


def packing_problem(model: Any, vocabulary_size: int, config: Any, pairs: bool = False) -> str | None:
    """Why this model cannot be trained on packed rows (or pairs), or None; the same answer on every rank."""
    items, pack, pad = (
        (random_pairs(vocabulary_size), pack_pairs, pad_pairs)
        if pairs
        else (random_rows(vocabulary_size), pack_rows, pad_rows)
    )
    problem = None
    placed = is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if not placed and not getattr(model, "is_quantized", False):
        model.to(config.device)  # the trainer would do it a moment later
    try:
        difference = packing_difference(model, items, pack, pad, config)
        if not difference <= DIFFERENCE_LIMIT:
            problem = (
                f"in one sequence the rows move each other's log-probabilities by {difference:.2g} of their spread"
            )
    except (TypeError, RuntimeError, NotImplementedError, IndexError, ValueError) as error:
        problem = f"the probe failed ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    if torch.distributed.is_initialized():
        answer = [problem]  # under FSDP only the first rank holds the weights
        torch.distributed.broadcast_object_list(answer, src=0)
        problem = answer[0]
    return problem
