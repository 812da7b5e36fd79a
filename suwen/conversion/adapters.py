"""LoRA adapters that were trained on fused projections: the same A for every part, and the part's rows of B."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from suwen.conversion.configs import Config
from suwen.conversion.families import Family, apply_rule, find_rule
from suwen.conversion.tables import Rule
from suwen.conversion.weights import Tensors, read_json

PREFIX = "base_model.model."
OLD_SETTINGS = ("enable_lora", "merge_weights")  # of PEFT before 0.3; merge_weights was about its own memory
MATRIX = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?P<end>\.weight)?")


def convert_adapter(source: Path, base: str, family: Family, config: Config, target: Path) -> list[str]:
    """Convert a LoRA folder to the names of its converted base, and .bin to safetensors.

    Args:
        source: adapter_config.json with adapter_model.safetensors or .bin.
        base: what the new folder names as its base.
        family: of the base; a native one keeps all names.
        config: the base's, from before it was converted.
        target: new folder.

    Returns:
        The new names of the adapted modules.

    Raises:
        ValueError: a part of the adapter has no exact counterpart.
    """
    settings = read_json(source / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{source}: found peft_type {settings.get('peft_type')!r}, expected LORA")
    for entry in ("fan_in_fan_out", "enable_lora"):
        if settings.get(entry):
            raise ValueError(f"{source}: found {entry}, expected an adapter of linear layers")
    tensors = Tensors(source)
    converted: dict[str, Tensor] = {}
    modules: set[str] = set()
    for name in tensors.place:
        for new, tensor in convert_tensor(family, config, name, tensors[name]):
            converted[new] = tensor.clone(memory_format=torch.contiguous_format)
            if match := MATRIX.fullmatch(new.removeprefix(PREFIX)):
                modules.add(match["module"].rsplit(".", 1)[-1])
    if family.rules:
        for entry in ("target_modules", "modules_to_save"):
            if settings.get(entry):
                settings[entry] = sorted(new_module_names(family, settings[entry]))
        if any(settings.get(entry) for entry in ("rank_pattern", "alpha_pattern", "layers_pattern")):
            raise ValueError(
                f"{source}: ranks by pattern of names are not converted; train with one rank for all modules"
            )
    settings["base_model_name_or_path"] = base
    for entry in ("auto_mapping", *OLD_SETTINGS):
        settings.pop(entry, None)
    target.mkdir(parents=True, exist_ok=True)
    save_file(converted, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return sorted(modules)


def convert_tensor(family: Family, config: Config, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """[(new name, tensor)] of one tensor of an adapter's file: a LoRA matrix, or a module that was trained in full."""
    plain = name.removeprefix(PREFIX).replace(".modules_to_save", "").replace(".default", "")
    match = MATRIX.fullmatch(plain)
    module = match["module"] if match else re.sub(r"\.(weight|bias)$", "", plain)
    found = find_rule(family, f"{module}.weight" if match else plain)
    if found is None:
        raise ValueError(f"adapter: {name} is unknown to the table of {family.name}")
    rule, targets = found  # no targets: a buffer that is computed anew
    if match is None:
        parts = apply_rule(rule, tensor, config) if targets else ()
        return [(PREFIX + target, part) for target, part in zip(targets, parts, strict=True)]
    if not rule.linear:
        raise ValueError(f"adapter: {name}: the layer is normalised in the original, so an adapter on it has no equal")
    modules = [target.removesuffix(".weight") for target in targets]
    # The rows of the weight are those of B; A is common to all parts, and an embedding's matrices are only renamed.
    by_rows = match["part"] in ("lora_B", "lora_magnitude_vector")
    parts = apply_rule(rule, tensor, config) if by_rows else [tensor] * len(modules)
    end = f".{match['part']}{match['end'] or ''}"
    return [(PREFIX + new + end, part) for new, part in zip(modules, parts, strict=True)]


def new_module_names(family: Family, names: list[str] | str) -> set[str]:
    """What the last parts of module names become: {W_pack} -> {q_proj, k_proj, v_proj}."""
    if isinstance(names, str):
        raise ValueError(f"adapter_config.json: target_modules is the pattern {names!r}, expected a list of names")
    wanted = {name.rsplit(".", 1)[-1] for name in names}
    found: dict[str, set[str]] = {}
    for rule in family.rules:
        for target in rule.targets:
            found.setdefault(last_name(rule, rule.source), set()).add(last_name(rule, target))
    if unknown := wanted - found.keys():
        raise ValueError(f"adapter_config.json: {', '.join(sorted(unknown))} is unknown to the table of {family.name}")
    return {new for name in wanted for new in found[name]}


def last_name(rule: Rule, pattern: str) -> str:
    return pattern.removesuffix(".weight").removesuffix(".{p}").rsplit(".", 1)[-1]
