"""Weights on the disk and in memory: compared tensor by tensor when saved, and all of them taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from suwen.checkpoint import Unlike

MOMENTS_BYTES = 8  # a trained parameter, before the first step: AdamW's two in float32
MASTERS_BYTES = 4  # and DeepSpeed's own copy
# An adapter never brings new rows of its own for the embeddings; "auto" would ask the hub how many its base had, with
# a wait and a warning in every save where that base is a LoRA folder
NO_EMBEDDINGS: dict[str, Any] = {"save_embedding_layers": False}


def save_compared(model: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None, **options: Any) -> None:
    """`model.save_pretrained`; what it has written is read back, and compared with the live tensors.

    Raises:
        Unlike: a tensor differs, is missing, or is of another type, or there is none at all.
    """
    given = dict(state_dict) if state_dict is not None else None  # the library may empty it
    if isinstance(model, PeftModel):
        options |= NO_EMBEDDINGS
    model.save_pretrained(folder, state_dict=given, **options)
    require_saved(model, folder, state_dict)


def require_saved(model: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Compare the weights of a folder with the live tensors, the model's or those of `state_dict`, bit for bit.

    Raises:
        Unlike: a tensor differs, is missing, or is of another type, or there is none at all.
    """
    live, files = _by_stored_name(model, state_dict), sorted(folder.glob("*.safetensors"))
    if not isinstance(model, PeftModel) and not stored_names(files) <= live.keys():
        # The library stores experts one by one, and computes with stacks of them
        live = revert_weight_conversion(model, live)
    require_equal(live, files)


@contextmanager
def taken_up(folder: Path) -> Iterator[None]:
    """A comparison after an engine has read a checkpoint's weights from files of its own.

    Raises:
        ValueError: it has not read all of them.
    """
    try:
        yield
    except Unlike as error:
        raise ValueError(f"{folder}: was not taken up as it was saved ({error}); --resume never starts anew") from None


def stored_names(files: list[Path]) -> set[str]:
    names: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def load_saved(model: Any, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Fill the live tensors, the model's or those of `state_dict`, with the weights of a checkpoint, all of them.

    Raises:
        ValueError: a tensor is missing, unknown, or of another type or shape.
    """
    live = _by_stored_name(model, state_dict)
    filled: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                saved = file.get_tensor(name)
                if name not in live or (saved.dtype, saved.shape) != (live[name].dtype, live[name].shape):
                    raise ValueError(f"{path}: {name} does not fit this model; --resume never starts anew")
                live[name].copy_(saved)
                filled.add(name)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    same = {parameters[name]: name for name in filled if name in parameters}
    for name in live.keys() - filled:  # tied weights are stored once
        if parameters.get(name) not in same:
            raise ValueError(f"{folder}: {name} is missing; --resume never starts anew")
        live[name].copy_(live[same[parameters[name]]])


def _by_stored_name(model: Any, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The live tensors that a checkpoint holds, by their names in its files."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, state_dict=state_dict, **NO_EMBEDDINGS)
    return state_dict if state_dict is not None else model.state_dict()


def require_equal(live: dict[str, torch.Tensor], files: list[Path]) -> None:
    """
    Raises:
        Unlike: see `require_saved`.
    """
    if not live:
        raise Unlike("there are no weights to be saved")
    seen: set[int] = set()
    written: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name not in live or not _same(file.get_tensor(name), live[name]):
                    raise Unlike(f"{path.name}: {name} is not what is in memory")
                written.add(name)
                seen.add(live[name].data_ptr())
    # What is stored once under another name, such as tied embeddings, is not missing
    if left := [name for name, tensor in live.items() if name not in written and tensor.data_ptr() not in seen]:
        raise Unlike(f"{left[0]}: is not in the files")


def _same(saved: torch.Tensor, live: torch.Tensor) -> bool:
    """Bit for bit, so that a NaN is itself."""
    live = live.detach().to("cpu").contiguous()
    if saved.dtype != live.dtype or saved.shape != live.shape:
        return False
    return torch.equal(saved, live) or torch.equal(saved.flatten().view(torch.uint8), live.flatten().view(torch.uint8))


def state_bytes(model: Any, optimizer: Any, deepspeed: bool) -> int:
    """About what a checkpoint takes: trained weights (all, without an adapter) and optimizer state, on all ranks."""
    adapted = isinstance(model, PeftModel)
    sizes = [
        (getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in model.parameters()
    ]  # fmt: skip
    weights = sum(count * size for count, size, trained in sizes if trained or not adapted)
    trained = sum(count for count, _, trained in sizes if trained)
    if deepspeed:
        return weights + trained * (MOMENTS_BYTES + MASTERS_BYTES)
    state = getattr(optimizer, "state", None) or {}
    held = sum(
        value.numel() * value.element_size()
        for values in state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    return weights + (held if state else trained * MOMENTS_BYTES)
