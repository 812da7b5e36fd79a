"""Adapters on the disk: what they are, what they stand on, and whether they belong together.

Nothing here loads a weight into memory; every check is done before the work begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from suwen.command_line import make_folder
from suwen.lineage import (
    ADAPTER_WEIGHTS,
    adapter_base,
    adapter_shapes,
    file_sha256,
    is_adapter_dir,
    read_json,
    recorded_lineage,
    refuse_reward_model,
    resolve_lineage,
    weights_fingerprint,
)


@dataclass
class MergePlan:
    """What is merged into what; everything that can be checked before a weight is loaded has been checked."""

    base: str
    adapters: list[str]
    quantization: str  # of the base in the training of the last adapter: none, 8bit, 4bit or 2bit
    training_dtype: str  # in which the base was loaded before it was quantised
    merge_base: str  # dequantized or original; without quantisation always original
    tokenizer: str
    generation: str
    notes: list[str] = field(default_factory=list)


def plan_merge(
    base_model: str | None,
    adapters: list[str],
    tokenizer_path: str | None = None,
    merge_base: str = "dequantized",
    quantization: str | None = None,
) -> MergePlan:
    """Find base and order of the adapters, and refuse what does not belong together.

    Raises:
        ValueError: see `merge_adapters`.
    """
    if not adapters:
        raise ValueError("--lora_model: found no adapter, expected one or more LoRA folders")
    for adapter in adapters:
        check_adapter(adapter)
    chain = resolve_lineage(base_model) if base_model else resolve_lineage(adapters[0])[:-1]
    base, lineage = chain[0], [*chain[1:]]
    for adapter in lineage:
        check_adapter(adapter)
    lineage += adapters
    hashes = [file_sha256(Path(adapter) / ADAPTER_WEIGHTS) for adapter in lineage]
    merged_before = [entry.get("sha256") for entry in read_json(Path(base) / "merge.json").get("adapters", [])]
    notes = []
    for index, adapter in enumerate(lineage):
        if hashes[index] in merged_before:
            raise ValueError(f"adapter {adapter!r}: is already merged into the base {base!r} (see its merge.json)")
        if hashes[index] in hashes[:index]:
            raise ValueError(f"adapter {adapter!r}: given twice; it would be added twice")
        check_belongs(adapter, base, merged_before, hashes[:index])
    settings = [training_quantization(adapter, quantization) for adapter in lineage]
    if len({kind for kind, _ in settings}) > 1:
        kinds = ", ".join(f"{a}: {kind}" for a, (kind, _) in zip(lineage, settings, strict=True))
        notes.append(f"the adapters were trained on bases of different quantisation ({kinds}); the last one decides")
    kind, training_dtype = settings[-1]
    if len(lineage) > len(adapters):
        notes.append(f"adapters that the given ones stand on are merged first: {', '.join(lineage[: -len(adapters)])}")
    with_tokenizer = [a for a in reversed(lineage) if (Path(a) / "tokenizer_config.json").is_file()]
    with_generation = [a for a in reversed(lineage) if (Path(a) / "generation_config.json").is_file()]
    return MergePlan(
        base=base,
        adapters=lineage,
        quantization=kind,
        training_dtype=training_dtype,
        merge_base="original" if kind == "none" else merge_base,
        tokenizer=tokenizer_path or (with_tokenizer or [base])[0],
        generation=(with_generation or [base])[0],
        notes=notes,
    )


def check_adapter(adapter: str) -> None:
    """Refuse a folder that holds no readable adapter, or one that changed since its training."""
    folder = Path(adapter)
    if not folder.is_dir():
        raise ValueError(f"adapter {adapter!r}: found no such folder, expected a LoRA folder")
    if not is_adapter_dir(folder):
        kind = "a full model" if (folder / "config.json").is_file() else "no adapter_config.json"
        raise ValueError(f"adapter {adapter!r}: found {kind}, expected a LoRA folder")
    config = read_json(folder / "adapter_config.json")
    if not config.get("peft_type"):
        raise ValueError(f"{folder / 'adapter_config.json'}: found no peft_type, expected the settings of an adapter")
    refuse_reward_model(folder)
    shapes = adapter_shapes(adapter)
    if not shapes:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS}: found no tensors, expected the weights of an adapter")
    recorded = read_json(folder / "run.json").get("files", {}).get(ADAPTER_WEIGHTS)
    expected = recorded["sha256"] if isinstance(recorded, dict) else recorded  # the hash alone in earlier versions
    if expected and (found := file_sha256(folder / ADAPTER_WEIGHTS)) != expected:
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS}: found sha256 {found[:12]}, expected {expected[:12]} (run.json): changed since"
        )


def check_belongs(adapter: str, base: str, merged_before: list[str], before: list[str]) -> None:
    """Refuse an adapter whose recorded start differs from what it would be merged into.

    Shapes cannot tell two models of one family apart, so what the training recorded is compared: the adapter under it
    by the hash of its weights, the base by a fingerprint. Where nothing is recorded and the recorded folder is gone,
    there is nothing to compare, and the shapes alone must do.

    Args:
        merged_before: hashes of the adapters that the base holds already.
        before: hashes of the adapters that are merged before this one.
    """
    named = read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
    start = adapter_base(Path(adapter))
    links = recorded_lineage(adapter)
    last = links[-1] if links and links[-1].get("sha256") else {}

    weights = Path(start) / ADAPTER_WEIGHTS
    found = file_sha256(weights) if start and is_adapter_dir(start) and weights.is_file() else None
    expected = last["sha256"] if last and last.get("path") == named else found
    if found and found != expected:
        raise ValueError(f"adapter {adapter!r}: its start {start!r} has changed since the training")
    if expected and expected not in {*merged_before, *before}:
        raise ValueError(
            f"adapter {adapter!r}: was trained on top of the adapter {start!r}, which is not part of this merge; "
            f"give it before (--lora_model {start},{adapter}) or leave out --base_model"
        )
    if last and last.get("path") != named and last["sha256"] in before:
        # Quantised stages go on training a copy of the adapter that they start from.
        raise ValueError(f"adapter {adapter!r}: goes on from {last.get('path')!r} and contains it; give it alone")

    root = next((link for link in links if link.get("fingerprint")), {})
    expected = root.get("fingerprint")
    if expected is None and start and Path(start).is_dir() and not is_adapter_dir(start):
        if Path(start).resolve() == Path(base).resolve():
            return
        expected = weights_fingerprint(start)
    found = weights_fingerprint(base)  # None for a base on the hub that is not on this machine yet
    origin = read_json(Path(base) / "merge.json").get("base", {})
    if expected and found and expected not in (found, origin.get("fingerprint")):
        raise ValueError(
            f"adapter {adapter!r}: was trained on {root.get('path', start)!r}, whose weights differ from "
            f"those of the base {base!r}; give the base that it was trained on"
        )


def training_quantization(adapter: str, given: str | None) -> tuple[str, str]:
    """Quantisation and load precision of the base in an adapter's training, from its run.json, else as given."""
    run = read_json(Path(adapter) / "run.json")
    arguments = run.get("arguments", {})
    recorded = arguments.get("quantization")
    if recorded not in (None, "none", "8bit", "4bit", "2bit"):
        raise ValueError(
            f"{Path(adapter) / 'run.json'}: found quantization {recorded!r}, expected none, 8bit, 4bit or 2bit"
        )
    if recorded and given and recorded != given:
        raise ValueError(f"--quantization {given}: adapter {adapter!r} was trained with {recorded} (its run.json)")
    dtype = arguments.get("dtype") or "auto"
    if dtype == "auto" and (library := arguments.get("library")):  # what `auto` meant on the machine of the training
        dtype = "bfloat16" if library.get("bf16") else "float16" if library.get("fp16") else "float32"
    return recorded or given or "none", dtype


def check_output_dir(output_dir: str, inputs: list[str]) -> Path:
    """Refuse an output that could touch an input, and one that holds something already."""
    target = Path(output_dir).resolve()
    for item in inputs:
        folder = Path(item).resolve()
        if folder.is_dir() and (target == folder or folder in target.parents):
            raise ValueError(
                f"--output_dir {output_dir}: is {item} or lies inside it, expected a folder apart from the inputs"
            )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output_dir {output_dir}: found content there, expected a new or empty folder")
    make_folder(target.parent)
    return target
