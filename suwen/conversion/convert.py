"""Convert a checkpoint folder: weights, config, generation settings, tokenizer; and check it against the original."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from suwen.command_line import make_folder
from suwen.conversion.adapters import convert_adapter
from suwen.conversion.configs import Config, load_native
from suwen.conversion.families import FAMILIES, NATIVE, Family, convert_config, recognise
from suwen.conversion.originals import FORWARDS, original_logits
from suwen.conversion.tokenizers import convert_tokenizer
from suwen.conversion.weights import Tensors, check_plan, convert_weights, expected_tensors, plan_weights, read_json

TOLERANCE = 1e-4  # of the logits' spread: rounding in float32 over some 80 layers; two layers differ by 1e-6
UNITS = {"MB": 10**6, "GB": 10**9}


def conversion_command(config: Config, path: str | os.PathLike) -> str | None:
    """The command that converts the checkpoint at `path`; None if its config is one that loads without code.

    Args:
        config: content of its config.json.
        path: a folder or a hub name.
    """
    if is_converted(config):
        return None
    try:
        known = recognise(config) is not None
    except ValueError:
        known = True  # the conversion itself asks which of two families it is
    return command_for(path) if known else None


def command_for(path: str | os.PathLike, base: str | None = None) -> str:
    """The command that converts the folder at `path`; for a hub name the download comes first.

    `base`: that of a LoRA folder.
    """
    source, download = str(path).rstrip("/"), ""
    if not Path(source).exists():
        name, source = source, f"models/{source.rsplit('/', 1)[-1]}"
        download = f"hf download {shlex.quote(name)} --local-dir {shlex.quote(source)} && "
    target = shlex.quote(f"{source}-converted")
    source = shlex.quote(source)
    middle = f" --base_model {shlex.quote(base)}" if base else ""
    return f"{download}python tools/convert_checkpoint.py --model_name_or_path {source}{middle} --output_dir {target}"


def is_converted(config: Config) -> bool:
    """Whether a config is one of those that `suwen.architectures` reads, and not the original's under the same name."""
    kind = config.get("model_type")
    if "auto_map" in config or kind not in ("baichuan", "chatglm"):
        return False
    return "num_layers" not in config if kind == "chatglm" else "max_position_embeddings" not in config


def convert_checkpoint(
    source: str,
    output_dir: str,
    family_name: str | None = None,
    dtype: str | None = None,
    verify: bool = False,
    max_shard_size: str = "4GB",
    lines: list[str] | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Convert a model folder; the target appears only when everything has succeeded.

    Args:
        source: original folder, with its config.json.
        output_dir: new or empty folder.
        family_name: a name in FAMILIES, where the config does not tell; None finds it.
        dtype: of the written weights; None keeps that of the checkpoint.
        verify: compare the logits of the written model with the original forward pass.
        lines: further text on which the tokenizers must agree.

    Raises:
        ValueError: an unknown family, tensors or settings that the tables do not know, a tokenizer that cannot be
            reproduced, or logits that differ.
    """
    folder = Path(source)
    config = read_json(folder / "config.json")
    if not config:
        raise ValueError(f"--model_name_or_path {source}: found no config.json, expected a model folder")
    family = find_family(folder, config, family_name)
    limit = parse_size(max_shard_size)
    target = check_target(folder, output_dir)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-unfinished-", dir=target.parent))
    try:
        convert_into(folder, config, family, unfinished, dtype, limit, lines or [], log)
        if verify:
            log(compare_logits(folder, config, family, unfinished, dtype))
        publish(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log(f"wrote {output_dir}")


def find_family(folder: Path, config: Config, name: str | None) -> Family:
    import suwen.architectures  # noqa: F401  (registers its classes)

    if name:
        return FAMILIES[name]
    code = "".join(
        path.read_text(encoding="utf-8") for path in [*folder.glob("modeling_*.py"), *folder.glob("tokenization_*.py")]
    )
    if family := recognise(config, code):
        return family
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return NATIVE
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: a LoRA folder, expected --base_model with the converted base")
    raise ValueError(f"{folder / 'config.json'}: model_type {kind!r} has no table; known: {', '.join(FAMILIES)}")


def convert_into(
    folder: Path,
    config: Config,
    family: Family,
    target: Path,
    dtype: str | None,
    limit: int,
    lines: list[str],
    log: Callable[[str], None],
) -> None:
    from transformers import AutoModelForCausalLM

    native = family is NATIVE
    new_config = load_native(folder) if native else convert_config(family, config)
    log(f"{folder}: {config['model_type'] + ', kept' if native else f'{family.name} -> {family.model_type}'}")
    plan = plan_weights(family, config, folder)
    additions = family.additions(config)
    if new_config.tie_word_embeddings is False and tied_in_file(plan.written, native):
        new_config.tie_word_embeddings = True
    check_plan(family, plan, expected_tensors(new_config), additions)
    count = len(plan.written) + len(additions)
    log(f"{count} tensors in {dtype or plan.dtype}; left out {plan.dropped} buffers that are computed anew")
    convert_weights(family, config, plan, target, dtype, limit, additions)
    new_config.architectures = [AutoModelForCausalLM._model_mapping[type(new_config)].__name__]
    new_config.dtype = dtype or plan.dtype
    new_config.save_pretrained(target)
    summary = convert_tokenizer(folder, target, family, lines)
    log(summary or "note: found no tokenizer files; the model is converted without a tokenizer")
    write_generation_config(folder, target, new_config, log)
    record = {"family": family.name, "source": str(folder), "source_config": config}
    (target / "conversion.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tied_in_file(written: dict[str, tuple[int, ...]], native: bool) -> bool:
    return not native and "lm_head.weight" not in written


def write_generation_config(folder: Path, target: Path, config: Any, log: Callable[[str], None]) -> None:
    """Sampling settings of the original that are still known, and the ids of the new config and tokenizer."""
    from transformers import AutoTokenizer, GenerationConfig

    from suwen.encoding import ChatEncoder

    known = set(GenerationConfig().to_dict()) - {"transformers_version", "_from_model_config"}
    settings = {k: v for k, v in read_json(folder / "generation_config.json").items() if k in known and v is not None}
    ends = settings.pop("eos_token_id", config.eos_token_id)
    ends = list(ends) if isinstance(ends, list) else [ends]
    if (target / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
        ends.append(tokenizer.eos_token_id)
        settings |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
        if tokenizer.chat_template:
            try:
                ends += ChatEncoder(tokenizer).stop_token_ids
            except ValueError as error:
                log(f"note: generation stops at EOS alone, as no stop token follows from the chat template ({error})")
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    generation = GenerationConfig(eos_token_id=ends if len(ends) > 1 else (ends or [None])[0], **settings)
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True  # sampling settings without the switch
    generation.save_pretrained(target)


@torch.no_grad()
def compare_logits(folder: Path, config: Config, family: Family, target: Path, dtype: str | None) -> str:
    """Logits of the written model against the original forward pass, both in float32, on random rows with padding.

    Raises:
        ValueError: they differ by more than 1e-4 of their spread.
    """
    from transformers import AutoModelForCausalLM

    if family.name not in FORWARDS:
        return "nothing to verify: the tensors are those of the original"
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, trust_remote_code=False).eval()
    ids, mask = probe_rows(model.config)
    found = model(input_ids=ids, attention_mask=mask.long()).logits
    del model
    expected = original_logits(family.name, Tensors(folder, dtype), config, ids, mask)
    difference = (found - expected)[mask].abs().max().item()
    spread = expected[mask].std(-1).mean().item()
    told = f"largest difference {difference:.2g}, spread of the logits {spread:.3g}"
    if not difference <= TOLERANCE * spread:
        raise ValueError(f"{folder}: the converted model differs from the original ({told}); nothing was written")
    return f"verified against the original forward pass: {told}"


def probe_rows(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 24) random ids and their mask; the second row is padded on the left, the third has been cut by half."""
    generator = torch.Generator().manual_seed(11)
    high = min(config.vocab_size, getattr(config, "gmask_token_id", config.vocab_size))
    ids = torch.randint(3, high, (3, 24), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :7], mask[2, :12] = False, False
    if config.model_type == "chatglm":
        ids[:, 15], ids[:, 16] = config.gmask_token_id, config.bos_token_id
    return ids, mask


def convert_lora(
    source: str, base: str, output_dir: str, lines: list[str] | None = None, log: Callable[[str], None] = print
) -> None:
    """Convert a LoRA folder, with the tokenizer that it may bring, to its base; see `convert_adapter`.

    Args:
        base: the converted base, or one that needs no conversion.
        lines: further text on which the tokenizers must agree.
    """
    folder = Path(source)
    family, config = find_base_family(Path(base))
    target = check_target(folder, output_dir)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-unfinished-", dir=target.parent))
    try:
        modules = convert_adapter(folder, base, family, config, unfinished)
        summary = convert_tokenizer(folder, unfinished, family, lines or [])
        publish(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log(f"adapter on {', '.join(modules)}")
    if summary:
        log(summary)
    log(f"wrote {output_dir}")


def find_base_family(base: Path) -> tuple[Family, Config]:
    """The family of an adapter's base and the config that it had before it was converted, if it was."""
    from transformers import CONFIG_MAPPING

    record, config = read_json(base / "conversion.json"), read_json(base / "config.json")
    if record.get("family") in FAMILIES:
        return FAMILIES[record["family"]], record["source_config"]
    if config.get("model_type") in CONFIG_MAPPING and conversion_command(config, base) is None:
        return NATIVE, config
    raise ValueError(
        f"--base_model {base}: found neither the conversion.json of a converted model nor a model that needs no "
        "conversion, expected the folder that the base became"
    )


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s?(MB|GB)", text)
    if not match:
        raise ValueError(f"--max_shard_size: found {text!r}, expected a size such as 500MB or 4GB")
    return int(float(match[1]) * UNITS[match[2]])


def check_target(source: Path, output_dir: str) -> Path:
    """The folder to write: new or empty, and apart from the source."""
    target = Path(output_dir).resolve()
    if target == source.resolve() or source.resolve() in target.parents:
        raise ValueError(f"--output_dir {output_dir}: is the source or lies inside it, expected a folder apart from it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output_dir {output_dir}: found content there, expected a new or empty folder")
    make_folder(target.parent)
    return target


def publish(unfinished: Path, target: Path) -> None:
    """Give a finished temporary folder its name and the usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    unfinished.chmod(0o777 & ~mask)
    for file in unfinished.iterdir():
        file.chmod(0o666 & ~mask)
    if target.exists():
        target.rmdir()
    os.replace(unfinished, target)
