"""Load what a stage starts from: tokenizer, weights, adapters and where they came from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from suwen.encoding import apply_template

STAGES = ("pt", "sft", "rm", "dpo", "orpo", "ppo")
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


def require_model(path: str) -> None:
    """Refuse a path that is neither a model folder nor a plausible hub name, and folders that need foreign code."""
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
    if config.get("auto_map") and config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model {path!r}: model_type {config.get('model_type')!r} needs code from the folder, which never runs; "
            "convert the checkpoint to a native class first"
        )
    if not list(folder.glob("*.safetensors")):
        found = [p.name for p in folder.glob("*.bin")] or [p.name for p in folder.glob("*.pt*")] or ["no weights"]
        raise ValueError(f"model {path!r}: found {found[0]}, expected weights as safetensors")


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
    recorded = read_json(Path(path) / "run.json").get("lineage", [])
    base = adapter_base(Path(path))
    if not base:
        raise ValueError(f"adapter {path!r}: adapter_config.json names no base_model_name_or_path")
    if Path(base).resolve() == Path(path).resolve():
        raise ValueError(f"adapter {path!r}: names itself as its base")
    lineage = resolve_lineage(base)
    for link in recorded:
        weights = Path(base) / "adapter_model.safetensors"
        if (
            link.get("path") == base
            and link.get("sha256")
            and weights.is_file()
            and file_sha256(weights) != link["sha256"]
        ):
            raise ValueError(
                f"adapter {path!r}: its start {base!r} has changed since the training, expected the one recorded"
            )
    return [*lineage, path]


def load_tokenizer(path: str, template_name: str | None = None) -> Any:
    """Tokenizer with the chat template in place and a padding token.

    `template_name` None leaves the template alone (pretraining needs none); otherwise see `apply_template`.
    """
    folder = Path(path)
    if folder.is_dir() and is_adapter_dir(folder) and not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter_base(folder), template_name)
    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class") if folder.is_dir() else None
    if name and not any(hasattr(transformers, n) for n in (name, name + "Fast", name.removesuffix("Fast"))):
        raise ValueError(
            f"tokenizer {path!r}: class {name!r} is not part of transformers; convert the checkpoint first"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer {path!r}: {first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {path!r}: has no EOS token, expected one")
    if template_name is not None:
        apply_template(tokenizer, template_name)
    return tokenizer


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_config(path: str) -> Any:
    base = resolve_lineage(path)[0]
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {base!r}: {first_line(error)}") from None


def scale_rope(config: Any, kind: str, length: int) -> None:
    """Stretch rotary positions so that `length` tokens fit, in the way transformers 5 stores it.

    linear: Chen et al. 2023 (arXiv:2306.15595); yarn: Peng et al. 2023 (arXiv:2309.00071); dynamic: NTK-aware,
    acts only beyond the model's own window.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "rope_theta" not in parameters:
        raise ValueError(
            f"--rope_scaling: model type {config.model_type!r} has no rotary positions that can be stretched"
        )
    window = config.max_position_embeddings
    if length <= window:
        raise ValueError(f"--rope_scaling: --max_length {length} already fits the model's window of {window}")
    factor = length / window if kind == "yarn" else float(math.ceil(length / window))
    config.rope_parameters = {**parameters, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        config.rope_parameters["original_max_position_embeddings"] = window
    if kind != "dynamic":  # dynamic scaling starts where the model's own window ends
        config.max_position_embeddings = length


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes settings: LLM.int8 (arXiv:2208.07339), or NF4 with double quantisation (QLoRA, arXiv:2305.14314)."""
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return None


def load_base(
    path: str,
    dtype: torch.dtype | str,
    quantization: str = "none",
    compute_dtype: torch.dtype = torch.float32,
    device: str | None = None,
    attn_implementation: str | None = None,
    config: Any = None,
) -> Any:
    """A full model from a folder or the hub, without its adapters."""
    require_model(path)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "attn_implementation": attn_implementation}
    if config is not None:
        options["config"] = config
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, compute_dtype)
        options["device_map"] = {"": device or ("cuda" if torch.cuda.is_available() else "cpu")}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"model {path!r}: {first_line(error)}") from None
    return model.to(device) if device and quantization == "none" else model


def load_causal_lm(
    path: str,
    dtype: str = "auto",
    quantization: str = "none",
    device: str | None = None,
    attn_implementation: str | None = None,
    config: Any = None,
    trainable: bool = False,
) -> Any:
    """A model ready for use from a full model, a hub name or a LoRA folder.

    Unquantised, the adapters of a LoRA folder are merged into their base in float32, one after the other. Quantised,
    the last adapter stays on the quantised base as it was trained (merging would quantise twice); adapters before it
    were trained on other bases and cannot be put there.

    Args:
        path: full model folder, hub name, or LoRA folder.
        dtype: auto (the checkpoint's own), float32, bfloat16 or float16.
        quantization: none, 8bit or 4bit.
        device: cpu, cuda, cuda:N, or None to leave it where it was loaded.
        trainable: a quantised LoRA folder's adapter can be trained further.
    """
    base, *adapters = resolve_lineage(path)
    for adapter in adapters:  # an adapter trained on stretched positions needs them again
        trained = read_json(Path(adapter) / "run.json")
        if config is None and (kind := trained.get("arguments", {}).get("rope_scaling")):
            config = load_config(base)
            scale_rope(config, kind, trained["max_length"])
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    if not adapters:
        compute = torch.float32 if dtype == "auto" else torch_dtype
        if dtype == "auto" and quantization != "none" and torch.cuda.is_available():
            compute = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return load_base(base, torch_dtype, quantization, compute, device, attn_implementation, config)
    if quantization != "none":
        if len(adapters) > 1:
            raise ValueError(
                f"--quantization {quantization}: {path!r} stands on the adapter {adapters[-2]!r}; merge that one "
                "first with merge_peft_adapter.py"
            )
        compute = torch.float32 if dtype == "auto" else torch_dtype
        model = load_base(base, torch_dtype, quantization, compute, device, attn_implementation, config)
        return load_adapter(model, adapters[0], trainable)
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"model {path!r}: a LoRA folder cannot be merged under ZeRO-3; merge it first with merge_peft_adapter.py"
        )
    model = load_base(base, torch.float32, device=device, attn_implementation=attn_implementation, config=config)
    for adapter in adapters:
        model = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    # The folder that this model stands for: an adapter trained on it names it as its base.
    model.config._name_or_path = path
    model.name_or_path = path
    if dtype == "auto":
        torch_dtype = getattr(
            torch, str(read_json(Path(base) / "config.json").get("dtype") or "float32"), torch.float32
        )
    return model.to(torch_dtype)


def load_adapter(model: Any, adapter: str, trainable: bool = False) -> Any:
    """Put the adapter of a LoRA folder on its base; grows the vocabulary when the adapter carries a larger one."""
    from safetensors import safe_open

    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"adapter {adapter!r}: found no adapter_model.safetensors")
    try:
        with safe_open(weights, "pt") as file:
            rows = [
                file.get_slice(k).get_shape()[0]
                for k in file.keys()
                if re.search(r"(embed_tokens|wte|word_embeddings)\.weight$", k)
            ]
    except Exception as error:  # safetensors raises its own class for damaged files
        raise ValueError(f"adapter {adapter!r}: {first_line(error)}") from None
    if rows and rows[0] > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows[0])
    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        base = getattr(model, "name_or_path", "the base")
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"adapter {adapter!r}: does not fit the base {base!r}: {reason}") from None


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if is_deepspeed_zero3_enabled():
        return  # the weights are partitioned: their shapes say nothing here
    if len(tokenizer) > rows:
        raise ValueError(
            f"tokenizer and model do not fit: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows}"
            " rows; give the tokenizer that belongs to the model"
        )


def compute_precision(library: dict[str, Any]) -> str:
    """bf16, fp16 or fp32: the user's choice, else what the hardware does well.

    CUDA: bf16 from compute capability 8.0 on, else fp16 with a loss scaler. CPU: bf16 where AVX512_BF16 or AMX exists.
    """
    if library.get("bf16") and library.get("fp16"):
        raise ValueError("--bf16 and --fp16: give one of them")
    if library.get("bf16"):
        return "bf16"
    if library.get("fp16"):
        if library.get("use_cpu") or not torch.cuda.is_available():
            raise ValueError("--fp16: needs a GPU; on the CPU use --bf16, or neither for fp32")
        return "fp16"
    if library.get("bf16") is False or library.get("fp16") is False:
        return "fp32"
    if torch.cuda.is_available() and not library.get("use_cpu"):
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def load_for_training(path: str, model_args: Any, lora: Any, precision: str, max_length: int) -> Any:
    """Weights for a stage: float32 for what is trained, the compute precision for what LoRA freezes."""
    config = None
    if model_args.rope_scaling:
        config = load_config(path)
        scale_rope(config, model_args.rope_scaling, max_length)
    dtype = model_args.dtype
    if dtype == "auto":
        frozen = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
        dtype = "bfloat16" if model_args.pure_bf16 else (frozen if lora.use_peft else "float32")
    device = None
    if model_args.quantization != "none":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return load_causal_lm(
        path, dtype, model_args.quantization, device, model_args.attn_implementation, config, trainable=True
    )


def lora_config(lora: Any, model: Any) -> LoraConfig | None:
    """PEFT settings of a new adapter; None for full training, or where the model already carries the adapter."""
    if not lora.use_peft or isinstance(model, PeftModel):
        return None
    targets = lora.target_modules.strip()
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    chosen: str | list[str] = (
        "all-linear" if targets in ("all", "all-linear") else [t.strip() for t in targets.split(",")]
    )
    saved = [name.strip() for name in lora.modules_to_save.split(",")] if lora.modules_to_save else None
    for flag_name, wanted in (
        ("target_modules", chosen if isinstance(chosen, list) else []),
        ("modules_to_save", saved or []),
    ):
        if missing := [name for name in wanted if name not in names]:
            linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise ValueError(
                f"--{flag_name}: found {', '.join(missing)}, expected names of this model: {', '.join(linear)}"
            )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=chosen,
        modules_to_save=saved,
    )
