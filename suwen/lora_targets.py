"""What of a model LoRA trains: layers by names as users know them, resolved for each family, and rows of new words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from suwen.lineage import read_json

VOCABULARY_RECORD = "vocabulary.json"  # in a model folder whose vocabulary was extended

# Fused projections that converted checkpoints no longer have: MedicalGPT's target names for Baichuan, ChatGLM2 and 3,
# InternLM2 and Qwen 1
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj")
ALIASES = dict.fromkeys(("W_pack", "query_key_value", "wqkv", "c_attn"), ATTENTION_PARTS)

# PEFT 0.21 takes these names for the stacked experts of such models, though their shared experts and dense layers are
# linear layers of the same names; it reaches experts as parameters only, not with dropout, and not in 4 bits.
TAKEN_FOR_EXPERTS = dict.fromkeys(("deepseek_v2", "deepseek_v3"), {"gate_proj", "up_proj", "down_proj"})


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of all linear layers outside the head that LoRA can adapt, quantised ones too, sorted."""
    head = getattr(model, "score", None) or model.get_output_embeddings()
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    found = {name.rsplit(".", 1)[-1] for name, module in modules if module is not head}
    return sorted(found - TAKEN_FOR_EXPERTS.get(model.config.get_text_config().model_type, set()))


def lora_targets(model: Any, wanted: str) -> list[str]:
    """Module names for PEFT from the flag's value.

    "all" is every linear layer but the head, in DeepSeek-V2 and V3 those of the attention. The stacked experts of MoE
    models are no linear layers and stay as they are: PEFT reaches them as parameters, but only without dropout, and
    trains many times the weights there. A fused name of an old checkpoint means its parts where the model has these
    instead.

    Args:
        wanted: all, all-linear, or names, comma-separated.

    Raises:
        ValueError: a name that no module of the model has, or that PEFT takes for another.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if names in (["all"], ["all-linear"]):
        return linear_names(model)
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    resolved = [part for name in names for part in (ALIASES.get(name, (name,)) if name not in present else (name,))]
    if missing := [name for name in resolved if name not in present]:
        known = ", ".join(linear_names(model))
        raise ValueError(f"--target_modules: found {', '.join(missing)}, expected names of this model: {known}")
    taken = TAKEN_FOR_EXPERTS.get(model.config.get_text_config().model_type, set())
    if wrong := [name for name in resolved if name in taken]:
        known = ", ".join(linear_names(model))
        raise ValueError(
            f"--target_modules: {', '.join(wrong)} are stacked experts to PEFT here, expected some of {known}"
        )
    return list(dict.fromkeys(resolved))


def trainable_token_indices(
    model: Any, folder: str | Path, trained_in_full: Sequence[str] = ()
) -> dict[str, list[int]] | None:
    """PEFT's setting that trains the rows of new tokens beside a LoRA adapter; None where there is nothing to train so.

    Without it an adapter trained on an extended vocabulary leaves the new rows as they were initialised. A tied head is
    the same table, which PEFT keeps tied.

    Args:
        folder: of the model; its record says which tokens are new.
        trained_in_full: names of --modules_to_save; a table among them is trained with all its rows.

    Raises:
        ValueError: one of two tied tables would be trained in full, and the new rows of the other not at all.
    """
    ids = sorted(read_json(Path(folder) / VOCABULARY_RECORD).get("new_tokens", {}).values())
    if not ids:
        return None
    source, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    tables = [names[id(table)] for table in (source, head) if table is not None]
    rest = [name for name in tables if name not in trained_in_full]
    if head is not None and head.weight is source.weight:
        if len(rest) == 1:
            raise ValueError(
                f"--modules_to_save: found one of {' and '.join(tables)}, which are one table in this model with new "
                "words; name both or neither (the rows of new words are trained without it)"
            )
        rest = rest[:1]
    return dict.fromkeys(rest, ids) or None
