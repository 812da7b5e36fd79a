"""Where a model came from: folders on the disk, the adapters in them and what they were trained on.

Nothing here loads a weight into memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from suwen.conversion.convert import command_for, conversion_command
from suwen.readers import first_line

ADAPTER_WEIGHTS = "adapter_model.safetensors"
STAGES = ("pt", "sft", "dpo", "orpo", "ppo")  # whose results answer; a reward model (rm) only scores
# What each stage goes on from, the nearest first.
STAGES_BEFORE = {
    "pt": (),
    "sft": ("pt",),
    "dpo": ("sft", "pt"),
    "rm": ("sft", "pt"),
    "orpo": ("sft", "pt"),
    "ppo": ("sft", "pt"),
}


def read_json(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}, expected a JSON file") from None


def is_adapter_dir(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def is_reward_model(path: str | Path) -> bool:
    """Whether a folder holds a model that gives a text one score instead of going on with it."""
    if is_adapter_dir(path):
        return read_json(Path(path) / "adapter_config.json").get("task_type") == "SEQ_CLS"
    return has_reward_head(read_json(Path(path) / "config.json"))


def has_reward_head(config: Any) -> bool:
    """The same of a config object, or of the content of its file."""
    names = config.get("architectures") if isinstance(config, dict) else config.architectures
    return any(str(name).endswith("ForSequenceClassification") for name in names or [])


def refuse_reward_model(path: str | Path) -> None:
    if is_reward_model(path):
        raise ValueError(f"model {str(path)!r}: is a reward model, which scores answers; expected one that writes them")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_finished_stage(outputs: str | Path = "outputs", stages: tuple[str, ...] = STAGES) -> str | None:
    """The newest of the finished stage folders below `outputs`; None if there is none."""
    finished = []
    for stage in stages:
        folder = Path(outputs) / stage
        if (folder / "run.json").is_file() and read_json(folder / "run.json").get("finished"):
            finished.append(folder)
    return str(max(finished, key=lambda folder: (folder / "run.json").stat().st_mtime)) if finished else None


def find_start(model_name_or_path: str | None, outputs: str, stage: str) -> tuple[str, str]:
    """What a stage starts from and why: the path given, else the stage before, else the embedded model."""
    if model_name_or_path:
        return model_name_or_path, "--model_name_or_path"
    for before in STAGES_BEFORE[stage]:
        if found := find_finished_stage(outputs, (before,)):
            return found, f"the finished {before} stage"
    from suwen.embedded import build_embedded_model

    return str(build_embedded_model()), "the embedded default, as no stage before this one has finished"


def needs_code(config: dict[str, Any], path: str) -> str | None:
    """Why a checkpoint cannot be loaded without code of its own, and what to do; None for one that can.

    Args:
        config: content of its config.json.
        path: a folder or a hub name.
    """
    if command := conversion_command(config, path):
        return f"needs code from its folder, which never runs; convert it: {command}"
    kind = config.get("model_type")
    known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    if config.get("auto_map") and not known:
        return (
            f"model_type {kind!r} needs code from its folder, which never runs; "
            "tools/convert_checkpoint.py does not know it"
        )
    return None


def require_model(path: str) -> None:
    """Refuse a path that is neither a model folder nor a plausible hub name, and folders that need foreign code.

    What a hub name stands for is looked at where its config is fetched, see `suwen.models.config_of_lineage`.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            raise ValueError(f"model {path!r}: found no such folder, expected a model folder or a hub name")
        if path.split("/")[0] in {"outputs", "models", "data"}:
            raise ValueError(f"model {path!r}: found no such folder, expected a finished stage or a model folder")
        return
    if is_adapter_dir(folder):
        return
    config = read_json(folder / "config.json")
    if not config:
        raise ValueError(
            f"model {path!r}: found no config.json or adapter_config.json, expected a model or LoRA folder"
        )
    if reason := needs_code(config, path):
        raise ValueError(f"model {path!r}: {reason}")
    if not list(folder.glob("*.safetensors")):
        found = [p.name for p in folder.glob("*.bin")] or [p.name for p in folder.glob("*.pt*")] or ["no weights"]
        raise ValueError(
            f"model {path!r}: found {found[0]}, expected weights as safetensors; convert once: {command_for(path)}"
        )


def adapter_base(adapter: Path) -> str:
    """Base of a LoRA folder, as recorded; a folder that moved together with its base is found beside it."""
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    if base and not Path(base).is_dir() and (adapter.parent / Path(base).name).is_dir():
        return str(adapter.parent / Path(base).name)
    return base


def resolve_lineage(path: str) -> list[str]:
    """[base, adapter, adapter, ...] of a model path, in the order in which the adapters were trained.

    Raises:
        ValueError: a missing folder, or an adapter whose recorded start has changed since.
    """
    require_model(path)
    if not is_adapter_dir(path):
        return [path]
    named = read_json(Path(path) / "adapter_config.json").get("base_model_name_or_path")
    base = adapter_base(Path(path))
    if not base:
        raise ValueError(f"adapter {path!r}: adapter_config.json names no base_model_name_or_path")
    if Path(base).resolve() == Path(path).resolve():
        raise ValueError(f"adapter {path!r}: names itself as its base")
    lineage = resolve_lineage(base)
    for link in recorded_lineage(path):
        if link.get("path") == named and changed(base, link):
            raise ValueError(
                f"adapter {path!r}: its start {base!r} has changed since the training, expected the one recorded"
            )
    return [*lineage, path]


def recorded_lineage(adapter: str) -> list[dict[str, Any]]:
    """What the training of an adapter recorded of the models it stands on, base first; empty where nothing was."""
    links = read_json(Path(adapter) / "run.json").get("lineage", [])
    return [link for link in links if isinstance(link, dict)] if isinstance(links, list) else []


def changed(model: str, link: dict[str, Any]) -> bool:
    """Whether a model differs from what a lineage recorded of it; no where there is nothing to compare."""
    if is_adapter_dir(model):
        weights = Path(model) / ADAPTER_WEIGHTS
        return bool(link.get("sha256")) and weights.is_file() and file_sha256(weights) != link["sha256"]
    found = weights_fingerprint(model) if link.get("fingerprint") else None
    return found is not None and found != link["fingerprint"]


def describe_lineage(path: str) -> list[dict[str, str]]:
    """What run.json keeps of the way to a model: the base with its fingerprint, then each adapter with its hash."""
    base, *adapters = resolve_lineage(path)
    fingerprint = weights_fingerprint(base)
    links = [{"path": base} | ({"fingerprint": fingerprint} if fingerprint else {})]
    return links + [{"path": adapter, "sha256": file_sha256(Path(adapter) / ADAPTER_WEIGHTS)} for adapter in adapters]


def weights_fingerprint(model: str) -> str | None:
    """A hash over names, shapes and samples of all tensors of a model; None if its files are not on this machine.

    It reads 16 pieces of 64 bytes of each tensor, so that it takes about a second for the largest models. The same
    weights in other shards give the same value. It tells different trainings apart; it is no protection against
    forgery.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True, allow_patterns=["*.safetensors"]))
        except (OSError, ValueError):
            return None
    files = sorted(folder.glob("*.safetensors"))
    return _fingerprint(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=32)
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str | None:
    samples: dict[str, bytes] = {}
    for path, *_ in files:
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name, entry in header.items():
                    if name == "__metadata__":
                        continue
                    start, end = entry["data_offsets"]
                    digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
                    for piece in range(16):
                        file.seek(8 + length + start + (end - start - min(64, end - start)) * piece // 15)
                        digest.update(file.read(min(64, end - start)))
                    samples[name] = digest.digest()
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path}: damaged or no safetensors file ({first_line(error)})") from None
    if not samples:
        return None
    return hashlib.sha256(b"".join(name.encode() + samples[name] for name in sorted(samples))).hexdigest()


def adapter_shapes(adapter: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an adapter, by its name in the file."""
    weights = Path(adapter) / ADAPTER_WEIGHTS
    if not weights.is_file():
        if (Path(adapter) / "adapter_model.bin").is_file():
            raise ValueError(
                f"adapter {adapter!r}: found adapter_model.bin, expected {ADAPTER_WEIGHTS}, as pickle can run code; "
                f"convert once: {command_for(adapter, adapter_base(Path(adapter)) or 'BASE')}"
            )
        raise ValueError(f"adapter {adapter!r}: found no {ADAPTER_WEIGHTS}")
    try:
        with safe_open(weights, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights}: damaged or no safetensors file ({first_line(error)})") from None
