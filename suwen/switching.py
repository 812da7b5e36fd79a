"""Several adapters on one base: loaded once, chosen by name for each request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Chains = dict[str, tuple[str, ...]]  # name -> the PEFT adapters that are active for it


def named_folders(words: list[str]) -> dict[str, str]:
    """ "NAME=DIR" or "DIR", whose name is then the last part of its path."""
    folders: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals:
            name, folder = Path(word).resolve().name, word
        if not name or not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(f"--lora_model {word}: found no adapter there, expected a LoRA folder, or NAME=FOLDER")
        if name in folders:
            raise ValueError(f"--lora_model: {folders[name]} and {folder} are both called {name}; give NAME=FOLDER")
        folders[name] = folder
    return folders


def find_base(base: str | None, folders: dict[str, str]) -> tuple[str, dict[str, list[str]]]:
    """The one base of all adapters, and for each the chain of adapters from the base up to it.

    Raises:
        ValueError: they stand on different bases, or one was not trained on what is under it.
    """
    from suwen.adapters import plan_merge
    from suwen.lineage import resolve_lineage

    root = resolve_lineage(base)[0] if base else None
    lineages = {name: resolve_lineage(folder) for name, folder in folders.items()}
    plans = {name: plan_merge(root or lineage[0], lineage[1:]) for name, lineage in lineages.items()}
    bases = {plan.base: name for name, plan in plans.items()}
    if len(bases) > 1:
        found = ", ".join(f"{name} on {found}" for found, name in bases.items())
        raise ValueError(f"--lora_model: found adapters of different bases ({found}), expected one base for all")
    return next(iter(bases)), {name: plan.adapters for name, plan in plans.items()}


def load_adapters(model: Any, chains: dict[str, list[str]]) -> tuple[Any, Chains]:
    """Put every adapter of the chains on `model` once, none merged.

    An adapter that was trained on another one is active together with it: on linear layers the sum of their changes is
    what merging one after the other gives.
    """
    from peft import PeftModel

    from suwen.lineage import adapter_shapes

    rows = model.get_input_embeddings().weight.shape[0]
    loaded: dict[str, str] = {}  # folder -> PEFT's name for it
    for folder in dict.fromkeys(folder for chain in chains.values() for folder in chain):
        shapes = adapter_shapes(folder)
        if any(key.endswith("embed_tokens.weight") and shape[0] != rows for key, shape in shapes.items()):
            raise ValueError(f"--lora_model {folder}: brings a vocabulary of its own; merge it, and serve the result")
        loaded[folder] = f"adapter{len(loaded)}"
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(folder, loaded[folder])
            else:
                model = PeftModel.from_pretrained(model, folder, loaded[folder])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--lora_model {folder}: does not fit the base: {reason}") from None
    model.eval()
    return model, {name: tuple(loaded[folder] for folder in chain) for name, chain in chains.items()}


@contextlib.contextmanager
def active(model: Any, adapters: tuple[str, ...]) -> Iterator[None]:
    """Answer with these adapters; with none, as the base alone."""
    if not hasattr(model, "peft_config"):
        yield
    elif not adapters:
        with model.disable_adapter():
            yield
    else:
        if tuple(model.active_adapters) != adapters:
            model.base_model.set_adapter(list(adapters), inference_mode=True)
        yield
