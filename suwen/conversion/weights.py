"""Convert a checkpoint's tensors shard by shard: memory holds one shard read and one shard to be written."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from suwen.conversion.configs import Config
from suwen.conversion.families import Family, apply_rule, find_rule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}, expected a JSON file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected an object")
    return content


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors where there are some, else .bin; those that an index names, or all.

    Raises:
        ValueError: none, or fewer than the index names.
    """
    for ending, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        if index := read_json(folder / f"{stem}{ending}.index.json"):
            shards = [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise ValueError(f"{folder}: found no {', '.join(missing)}, which {stem}{ending}.index.json names")
        else:
            ours = re.compile(rf"(pytorch_)?model(-\d+-of-\d+)?{re.escape(ending)}|adapter_model{re.escape(ending)}")
            shards = [path for path in sorted(folder.glob(f"*{ending}")) if ours.fullmatch(path.name)]
            check_all_parts(folder, shards)
        if shards:
            return shards
    raise ValueError(f"{folder}: found no model*.safetensors or pytorch_model*.bin, expected weights")


def check_all_parts(folder: Path, shards: list[Path]) -> None:
    """Refuse `model-00001-of-00003` without its two fellows."""
    parts = [match for shard in shards if (match := re.search(r"-(\d+)-of-(\d+)\.", shard.name))]
    if parts and len(parts) != int(parts[0][2]):
        raise ValueError(f"{folder}: found {len(parts)} weight files, expected {int(parts[0][2])} by their names")


class Shard:
    """One weight file, from which tensors are read one at a time; a .bin file is mapped, and nothing in it can run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[str, Tensor] | None = None
        try:
            if path.suffix == ".safetensors":
                self._file = safe_open(path, "pt")
                self.names = list(self._file.keys())
            else:
                self._mapped = self._map(path)
                self.names = [name for name, value in self._mapped.items() if isinstance(value, Tensor)]
        except pickle.UnpicklingError as error:
            line = next((line for line in str(error).splitlines() if "nsupported" in line or "GLOBAL" in line), "")
            raise ValueError(f"{path}: holds more than tensors, which is not read ({line.strip()[:200]})") from None
        except (SafetensorError, RuntimeError, OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({str(error).splitlines()[0][:200]})") from None

    @staticmethod
    def _map(path: Path) -> dict[str, Tensor]:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6: read whole

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape() if self._mapped is None else self._mapped[name].shape)

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name) if self._mapped is None else self._mapped[name]


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


class Tensors:
    """All tensors of a folder by name, read from the disk when they are asked for; in `dtype` if one is given."""

    def __init__(self, folder: Path, dtype: str | None = None) -> None:
        self.dtype = DTYPES[dtype] if dtype else None
        self.place = {name: path for path in find_shards(folder) for name in Shard(path).names}
        self._open: Shard | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.place:
            raise ValueError(f"found no tensor {name!r}, expected one in this family")
        if self._open is None or self._open.path != self.place[name]:
            self._open = Shard(self.place[name])
        return cast(self._open.read(name), self.dtype)

    def __contains__(self, name: str) -> bool:
        return name in self.place


class ShardWriter:
    """Collect tensors and write them in files of at most `limit` bytes (a larger tensor has a file of its own)."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.limit:
            self._flush()
        self.pending[name] = tensor.clone(memory_format=torch.contiguous_format)  # free of its mapped file
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self.pending, self.folder / f"part-{len(self.files)}", metadata={"format": "pt"})
        self.files.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def close(self) -> None:
        """Give the files their names, and write the index if there are several."""
        if self.pending:
            self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.files):
            name = "model.safetensors"
            if len(self.files) > 1:
                name = f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@dataclass
class Plan:
    """What a conversion will do, found from names and shapes alone."""

    shards: list[Path]
    unknown: list[str]
    dropped: int
    written: dict[str, tuple[int, ...]]
    dtype: str


def plan_weights(family: Family, config: Config, folder: Path) -> Plan:
    """Look every tensor of a checkpoint up in its family's table; nothing is converted yet.

    The shapes follow by converting empty tensors of the same shapes.
    """
    plan = Plan(find_shards(folder), [], 0, {}, "")
    for path in plan.shards:
        shard = Shard(path)
        for name in shard.names:
            found = find_rule(family, name)
            if found is None:
                plan.unknown.append(name)
                continue
            rule, targets = found
            if not targets:
                plan.dropped += 1
                continue
            if not plan.dtype:
                plan.dtype = str(shard.read(name).dtype).removeprefix("torch.")
            try:
                made = apply_rule(rule, torch.empty(shard.shape(name), device="meta"), config)
            except (RuntimeError, KeyError) as error:
                raise ValueError(f"{path}: {name} of shape {list(shard.shape(name))} does not fit ({error})") from None
            for target, tensor in zip(targets, made, strict=True):
                if target in plan.written:
                    raise ValueError(f"{path}: {name} becomes {target}, which another tensor has become already")
                plan.written[target] = tuple(tensor.shape)
    return plan


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the converted model must have on disk: experts stand there one by one."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        match = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
        if match is None:
            expected[name] = tuple(tensor.shape)
            continue
        count, rows, columns = tensor.shape
        for expert in range(count):
            parts = {"down_proj": (rows, columns)}
            if match[2] == "gate_up_proj":
                parts = {"gate_proj": (rows // 2, columns), "up_proj": (rows // 2, columns)}
            expected |= {f"{match[1]}.{expert}.{part}.weight": shape for part, shape in parts.items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    return expected


def check_plan(family: Family, plan: Plan, expected: dict[str, tuple[int, ...]], additions: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that does not give exactly the tensors of the new class."""
    if plan.unknown:
        raise ValueError(
            f"{plan.shards[0].parent}: {len(plan.unknown)} tensors are unknown to the table of {family.name}, such as "
            f"{plan.unknown[0]}; is it another family (--family), or a quantised or modified checkpoint?"
        )
    written = plan.written | {name: tuple(tensor.shape) for name, tensor in additions.items()}
    for name, shape in expected.items():
        if name not in written:
            raise ValueError(f"{plan.shards[0].parent}: nothing in the checkpoint becomes {name}; is it complete?")
        if written[name] != shape:
            raise ValueError(
                f"{plan.shards[0].parent}: {name} has shape {list(written[name])}, the config asks for {list(shape)}"
            )
    surplus = [name for name in written if name not in expected and name != "lm_head.weight"]
    if surplus:
        raise ValueError(f"{plan.shards[0].parent}: {surplus[0]} has no place in the model that config.json describes")


def convert_weights(
    family: Family,
    config: Config,
    plan: Plan,
    target: Path,
    dtype: str | None,
    limit: int,
    additions: dict[str, Tensor],
) -> None:
    """Write the converted tensors of `plan` into `target` as safetensors."""
    writer = ShardWriter(target, limit)
    chosen = DTYPES[dtype] if dtype else None
    names = sum(len(Shard(path).names) for path in plan.shards)
    with tqdm(total=names, desc="converting", unit="tensor", leave=False) as progress:
        for path in plan.shards:
            for name, tensor in converted_tensors(family, config, path, chosen, progress):
                writer.add(name, tensor)
    for name, tensor in additions.items():
        writer.add(name, tensor.to(chosen or getattr(torch, plan.dtype)))
    writer.close()


def converted_tensors(
    family: Family, config: Config, path: Path, dtype: torch.dtype | None, progress: tqdm
) -> Iterator[tuple[str, Tensor]]:
    shard = Shard(path)
    for name in shard.names:
        found = find_rule(family, name)
        assert found is not None
        rule, targets = found
        if targets:
            yield from zip(targets, apply_rule(rule, cast(shard.read(name), dtype), config), strict=True)
        progress.update()
