"""Which layers of a model LoRA adapts: names as users know them, resolved for each family."""

from __future__ import annotations

from typing import Any

import torch

# Fused projections that converted checkpoints no longer have: MedicalGPT's target names for Baichuan, ChatGLM2 and 3,
# InternLM2 and Qwen 1
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj")
ALIASES = dict.fromkeys(("W_pack", "query_key_value", "wqkv", "c_attn"), ATTENTION_PARTS)


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of all linear layers outside the head, quantised ones too, sorted."""
    head = model.get_output_embeddings()
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return sorted({name.rsplit(".", 1)[-1] for name, module in modules if module is not head})


def lora_targets(model: Any, wanted: str) -> list[str]:
    """Module names for PEFT from the flag's value.

    "all" is every linear layer but the head. The stacked experts of MoE models are no linear layers and stay as they
    are: PEFT reaches them as parameters, but only without dropout, and trains many times the weights there. A fused
    name of an old checkpoint means its parts where the model has these instead.

    Args:
        wanted: all, all-linear, or names, comma-separated.

    Raises:
        ValueError: a name that no module of the model has.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if names in (["all"], ["all-linear"]):
        return linear_names(model)
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    resolved = [part for name in names for part in (ALIASES.get(name, (name,)) if name not in present else (name,))]
    if missing := [name for name in resolved if name not in present]:
        known = ", ".join(linear_names(model))
        raise ValueError(f"--target_modules: found {', '.join(missing)}, expected names of this model: {known}")
    return list(dict.fromkeys(resolved))
