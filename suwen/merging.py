"""Merge LoRA adapters into their base, and prove on the written files that the merged model is the trained one.

What "the same" means. On probe inputs, over all logits, in float32 arithmetic:

    effect = mean |adapter on its base - base|           what the training changed
    error  = mean |merged model - adapter on its base|   what the merge changed

The merged model is read back from the disk, in the precision in which it was written. Every adapter must have an effect
above zero, and the error must be at most 1 % of the effect of the weakest adapter. Otherwise nothing is left behind.

The base "as trained". An adapter trained on a quantised base has learnt to correct the quantised weights, so by default
it is merged into these: the base is quantised as in the training and dequantised again, which gives the weights that
the training's kernels multiplied with (int8: codes times scales in float32; NF4: rounded to the precision of the
training). The kernels' own arithmetic is no property of the weights: LLM.int8 quantises the activations too
(arXiv:2208.07339), and a bfloat16 run rounds each activation. No merged model can reproduce that, so the adapter on the
dequantised base is what the merged model is held against, for 4 bit as for 8 bit. The distance to the logits of the
quantised kernels is measured and reported beside it, and must stay below a quarter of the logits' spread, which shows
that the dequantised weights are those of the kernels. Measured on small models, kernels against dequantised weights:
4 bit 0 in float32 and 0.7 to 1 % of the spread in bfloat16, 8 bit 1 to 2.5 %.
With `merge_base="original"` the adapter on the original base is the reference, and the distance to what was trained is
reported as the cost: for NF4 about 4 % of the effect of a strong adapter, but all of the effect of a weak one.

Rounding. Merging in float32 costs a few millionths of the effect. Rounding the merged weights to bfloat16 (8 bits of
mantissa) costs 0.4 % of the logits' spread whatever the adapter does (float16: 0.05 %): a strong adapter passes, a weak
one drowns in it. So `dtype="auto"` keeps the precision of the base where the proof holds with it, and falls back to
float32, with both numbers printed, where rounding alone would break it. A precision that the user names is refused if
it breaks the proof: the tolerance is the same for all.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from suwen import two_bit
from suwen.adapters import MergePlan, check_output_dir, plan_merge
from suwen.lineage import ADAPTER_WEIGHTS, adapter_shapes, file_sha256, read_json, weights_fingerprint
from suwen.models import (
    PROBE_SENTENCES,
    config_of_lineage,
    load_base,
    load_causal_lm,
    load_config,
    load_tokenizer,
    untie_if_needed,
)
from suwen.readers import first_line

TOLERANCE = 0.01  # of the effect
KERNEL_TOLERANCE = 0.25  # of the logits' spread
PACKAGES = ("torch", "transformers", "peft", "safetensors")
PROBE_SEED = 20240229
PROBE_LENGTH = 48


@dataclass
class Distance:
    """Absolute differences between two sets of logits, over all probes, positions and tokens."""

    mean: float
    max: float


def merge_adapters(
    base_model: str | None,
    adapters: list[str],
    output_dir: str,
    tokenizer_path: str | None = None,
    dtype: str = "auto",
    merge_base: str = "dequantized",
    quantization: str | None = None,
    max_shard_size: str = "4GB",
    device: str | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Merge adapters, in order, into a full-precision model folder; the arithmetic is float32.

    Args:
        base_model: full model or LoRA folder; None takes what the adapters record.
        adapters: LoRA folders, the first one merged first.
        output_dir: new or empty folder; it appears only when the proof holds.
        dtype: precision of the saved weights; auto is the base's own where the proof holds with it, else float32.
        merge_base: for adapters trained on a quantised base: "dequantized" (as trained) or "original".
        quantization: of the training, for adapters without a run.json.
        device: where to compute; None takes the GPU if there is one.

    Returns:
        What merge.json records: base, adapters with their hashes, the numbers of the proof, versions.

    Raises:
        ValueError: files that are missing, damaged or changed, an adapter that does not belong to the base, one without
            effect, or a proof that does not hold.
    """
    if not re.fullmatch(r"\d+(\.\d+)?\s?[KMGT]B", max_shard_size):
        raise ValueError(f"--max_shard_size: found {max_shard_size!r}, expected a size such as 500MB or 4GB")
    plan = plan_merge(base_model, adapters, tokenizer_path, merge_base, quantization)
    target = check_output_dir(output_dir, [plan.base, *plan.adapters, plan.tokenizer, plan.generation])
    for note in plan.notes:
        log(f"note: {note}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-unfinished-", dir=target.parent))
    try:
        try:
            record = _merge(plan, unfinished, dtype, max_shard_size, device, log)
            record["thinking"] = read_json(Path(plan.adapters[-1]) / "run.json").get("thinking", "auto")
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{plan.base}: does not fit into the GPU's memory ({first_line(error)}); add --use_cpu"
            ) from None
        (unfinished / "merge.json").write_text(
            json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o777 & ~mask)  # mkdtemp and safetensors make theirs private
        for file in unfinished.iterdir():
            file.chmod(0o666 & ~mask)
        if target.exists():
            target.rmdir()
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log(f"merged model: {target}")
    return record


# Weights


def training_config(plan: MergePlan) -> Any:
    """Config of the base as the last adapter's training had it."""
    config = config_of_lineage(plan.base, plan.adapters)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"base {plan.base!r}: is a quantised checkpoint, expected the full-precision model it was made from"
        )
    return config


def attach_adapter(model: Any, adapter: str) -> Any:
    """Put an adapter on a model; every tensor of its file must find its place and every place its tensor.

    Raises:
        ValueError: shapes, names or layers that differ, which means another base.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    reason = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of missing tensors; they are refused below
            peft = PeftModel.from_pretrained(model, adapter, torch_device=str(model.device)).eval()
            if not hasattr(peft, "merge_and_unload"):
                raise ValueError(
                    f"{peft.peft_config['default'].peft_type} is no change of weights and cannot be merged"
                )
            tensors = load_peft_weights(adapter, device="cpu")
            result: Any = set_peft_model_state_dict(peft, tensors)
        state = peft.state_dict()
        filled = {tensor.data_ptr() for name, tensor in state.items() if name not in set(result.missing_keys)}
        missing = [
            name
            for name in result.missing_keys
            if re.search(r"\.default(\.|$)", name) and state[name].data_ptr() not in filled  # tied to one that is there
        ]
        homeless = without_copies(result.unexpected_keys, tensors)
        if homeless:
            reason = f"its {plain_name(homeless[0])} has no place in the base ({len(homeless)} such)"
        elif missing:
            reason = f"the base's {plain_name(missing[0])} has no tensor in the adapter ({len(missing)} such)"
        else:
            reason = layers_left_out(adapter, model)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        mismatch = re.search(
            r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from checkpoint, "
            r"the shape in current model is torch\.Size\((\[.*?\])\)",
            str(error),
        )
        reason = first_line(error)[:300]
        if mismatch:
            reason = f"its {plain_name(mismatch[1])} has shape {mismatch[2]}, the base needs {mismatch[3]}"
    if reason:
        raise ValueError(f"adapter {adapter!r}: does not fit the base: {reason}; was it trained on another base?")
    return peft


def without_copies(unexpected: list[str], tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names without those whose tensor is also in the file under a name that found its place.

    PEFT writes the tables of an enlarged vocabulary twice: as the module, and as the wrapper around it or tied to it.
    """
    names = {plain_name(name) for name in unexpected}
    placed = [tensor for name, tensor in tensors.items() if plain_name(name) not in names]
    by_name = {plain_name(name): tensor for name, tensor in tensors.items()}
    return [
        name
        for name in unexpected
        if (tensor := by_name.get(plain_name(name))) is None
        or not any(tensor.shape == other.shape and torch.equal(tensor, other) for other in placed)
    ]


def layers_left_out(adapter: str, model: Any) -> str | None:
    """Say so when an adapter covers the first layers only, though nothing in its settings asks for that."""
    config = read_json(Path(adapter) / "adapter_config.json")
    layers = {int(m[1]) for key in adapter_shapes(adapter) if (m := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", key))}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    chosen = config.get("layers_to_transform") is not None or isinstance(config.get("target_modules"), str)
    if layers == set(range(len(layers))) and 0 < len(layers) < count and not chosen:
        return f"it covers {len(layers)} layers, the base has {count}"
    return None


def plain_name(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".default", "")


def fit_vocabulary(model: Any, plan: MergePlan, tokenizer: Any) -> None:
    """Give the base the rows of a vocabulary that was enlarged in the training, and explain sizes that do not fit.

    Values of new rows do not matter here: they come with the adapter, or the merge is refused. Padded embeddings,
    larger than the tokenizer, stay as they are.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    modules = {id(module): name for name, module in model.named_modules()}
    named = [modules.get(id(table)) for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    tables: set[str] = {name for name in named if name}
    tied = model.config.get_text_config().tie_word_embeddings
    wanted, carried = 0, set()
    for adapter in plan.adapters:
        config = read_json(Path(adapter) / "adapter_config.json")
        for key, shape in adapter_shapes(adapter).items():
            table = next((name for name in tables if f".{name}." in key), None)
            if table is None:
                continue
            if key.endswith(".weight") and "lora_" not in key:
                size = shape[0]
                carried.add(table)
                if size < rows and len(tokenizer) <= rows:
                    raise ValueError(
                        f"adapter {adapter!r}: does not fit the base: its {table} has {size} rows, the vocabulary of "
                        f"{plan.base!r} has {rows}; was it trained on another base?"
                    )
            elif key.endswith("trainable_tokens_delta"):
                size = 1 + max(highest_index(config.get("trainable_token_indices")), len(tokenizer) - 1)
                carried.add(table)
            else:
                continue
            wanted = max(wanted, size)
    if wanted <= rows:
        if len(tokenizer) > rows:
            raise ValueError(
                f"tokenizer {plan.tokenizer!r}: has {len(tokenizer)} tokens, the base {plan.base!r} {rows} rows of "
                "embeddings, and no adapter carries the missing rows; they were not saved with it (--modules_to_save "
                "embed_tokens,lm_head in the training keeps them), or the tokenizer belongs to another model"
            )
        return
    if not rows < len(tokenizer) <= wanted:
        raise ValueError(
            f"adapters {', '.join(plan.adapters)}: carry an embedding of {wanted} rows, the base {plan.base!r} "
            f"has {rows}, the tokenizer {plan.tokenizer!r} has {len(tokenizer)} tokens: a vocabulary enlarged in "
            "the training comes with its tokenizer; give it by --tokenizer_path, or the base of the training"
        )
    if not tied and tables - carried:
        raise ValueError(
            f"adapters {', '.join(plan.adapters)}: carry {wanted} rows of {', '.join(sorted(carried))} but none of "
            f"{', '.join(sorted(tables - carried))}, which the enlarged vocabulary needs too"
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if table is not None:
                table.weight[rows:] = table.weight[:rows].mean(
                    0
                )  # the same at every load, unlike the library's random rows


def highest_index(indices: Any) -> int:
    groups = indices.values() if isinstance(indices, dict) else [indices or []]
    return max((int(index) for group in groups for index in group), default=-1)


def load_merge_base(plan: MergePlan, tokenizer: Any, device: str) -> tuple[Any, list[torch.Tensor], dict[str, Any]]:
    """The base in float32, ready to merge into; the probes; and what the quantised kernels say, where there are any.

    Returns:
        (model, probes, {"base": logits, "adapter": logits or None}); the dictionary is empty without quantisation.
    """

    def load(quantization: str) -> Any:
        config = training_config(plan)
        if quantization == "none":
            model = load_base(plan.base, torch.float32, device=device, config=config)
        else:
            try:
                model = load_causal_lm(plan.base, plan.training_dtype, quantization, device, config=config)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ImportError) as error:
                raise ValueError(f"base {plan.base!r} in {quantization}: {first_line(error)}") from None
        fit_vocabulary(model, plan, tokenizer)
        return model.requires_grad_(False).eval()

    kernels: dict[str, Any] = {}
    if plan.quantization != "none":
        model = load(plan.quantization)
        probes = build_probes(tokenizer, model)
        kernels["base"], kernels["adapter"] = probe_logits(model, probes), None
        if len(plan.adapters) == 1:  # several adapters never stood on one quantised base
            kernels["adapter"] = probe_logits(attach_adapter(model, plan.adapters[0]), probes)
        del model  # loaded anew, as PEFT leaves modules trained in full behind when an adapter is taken off
    if plan.merge_base == "dequantized":
        model = dequantize(load(plan.quantization), plan.quantization).float().eval()
    else:
        model = load("none")
    return model, build_probes(tokenizer, model), kernels


def dequantize(model: Any, quantization: str) -> Any:
    """Full-precision model with the weights that the quantised kernels multiply with.

    int8 kernels scale their int32 sums in float32, so the weights are dequantised to float32. NF4 kernels expand to the
    precision of the training, so that rounding belongs to the weights. Two bits are expanded in float32.
    """
    if quantization == "2bit":
        return two_bit.dequantize_model(model)
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # one warning per layer type about the precision, which is chosen here
    try:
        return model.dequantize(dtype=torch.float32 if quantization == "8bit" else None)
    finally:
        logging.set_verbosity(level)


# The proof


def build_probes(tokenizer: Any, model: Any) -> list[torch.Tensor]:
    """Rows of token ids, each (1, T): seeded random ones, Chinese sentences, the newest tokens of the vocabulary."""
    size = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    length = min(PROBE_LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBE_LENGTH)
    generator = torch.Generator().manual_seed(PROBE_SEED)
    rows = [torch.randint(size, (length,), generator=generator).tolist() for _ in range(4)]
    rows += [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in PROBE_SENTENCES]
    rows.append(list(range(max(0, size - length), size)))
    return [torch.tensor([row]) for row in rows if row]


@torch.no_grad()
def probe_logits(model: Any, probes: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of every probe, each (T, V), in float32 on the CPU."""
    found = [model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in probes]
    if not all(torch.isfinite(logits).all() for logits in found):
        raise ValueError(
            "the logits hold NaN or infinity: the weights are damaged or out of the range of their precision"
        )
    return found


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> Distance:
    total, count, largest = 0.0, 0, 0.0
    for a, b in zip(first, second, strict=True):
        difference = (a - b).abs()
        total += difference.sum(dtype=torch.float64).item()
        count += difference.numel()
        largest = max(largest, difference.max().item())
    return Distance(total / count, largest)


def same_top_token(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Fraction of positions at which both prefer the same next token."""
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(first, second, strict=True)])
    return same.float().mean().item()


def spread(logits: list[torch.Tensor]) -> float:
    """Standard deviation of the logits of a position over the vocabulary, averaged over positions."""
    return torch.cat([rows.std(-1) for rows in logits]).mean().item()


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %" if whole else "infinite"


def _merge(
    plan: MergePlan, folder: Path, dtype: str, max_shard_size: str, device: str, log: Callable[[str], None]
) -> dict[str, Any]:
    tokenizer = load_tokenizer(plan.tokenizer)
    model, probes, kernels = load_merge_base(plan, tokenizer, device)
    start = probe_logits(model, probes)
    log(f"base: {plan.base} ({describe_base(plan)}), spread of its logits {spread(start):.4g}")
    model, steps, reference = merge_in_order(model, plan.adapters, probes, start, log)
    kernel_record = compare_kernels(plan, kernels, start, reference, log)

    part_tables(model)
    model.generation_config = read_generation_config(plan.generation, model)
    own_dtype = str(getattr(load_config(plan.base).get_text_config(), "dtype", None) or torch.float32)[len("torch.") :]
    candidates = list(dict.fromkeys([own_dtype, "float32"])) if dtype == "auto" else [dtype]
    weakest = min(step["effect"].mean for step in steps)
    name, error, merged = write_proven(
        model, folder, candidates, max_shard_size, device, probes, reference, weakest, log
    )
    tokenizer.save_pretrained(folder)
    packages = [*PACKAGES, *(["bitsandbytes"] if plan.quantization in ("8bit", "4bit") else [])]
    return {
        "base": {
            "path": plan.base,
            "fingerprint": weights_fingerprint(plan.base),
            "training_quantization": plan.quantization,
            "merged_into": plan.merge_base,
        },
        "adapters": [
            {
                "path": adapter,
                "sha256": file_sha256(Path(adapter) / ADAPTER_WEIGHTS),
                "effect": asdict(step["effect"]),
                "merge_error": asdict(step["error"]),
            }
            for adapter, step in zip(plan.adapters, steps, strict=True)
        ],
        "tokenizer": plan.tokenizer,
        "dtype": name,
        "proof": {
            "effect": asdict(distance(reference, start)),
            "weakest_effect_mean": weakest,
            "error": asdict(error),
            "error_fraction": error.mean / weakest,
            "tolerance": TOLERANCE,
            "same_top_token": same_top_token(merged, reference),
            "probes": len(probes),
            "positions": sum(ids.shape[1] for ids in probes),
            "seed": PROBE_SEED,
            **kernel_record,
        },
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def describe_base(plan: MergePlan) -> str:
    if plan.quantization == "none":
        return "as it is"
    bits = plan.quantization.removesuffix("bit")
    if plan.merge_base == "original":
        return f"original weights; the training saw them in {bits} bit"
    return f"in {bits} bit as trained, dequantised"


def merge_in_order(
    model: Any, adapters: list[str], probes: list[torch.Tensor], start: list[torch.Tensor], log: Callable[[str], None]
) -> tuple[Any, list[dict[str, Distance]], list[torch.Tensor]]:
    """Merge adapters one after the other in float32, each measured against itself before its merge.

    Args:
        start: logits of `model`.

    Returns:
        (merged model, effect and error of each adapter, logits with the last adapter attached but not merged).
    """
    steps, before, reference = [], start, start
    for adapter in adapters:
        untie_if_needed(model, adapter)
        peft = attach_adapter(model, adapter)
        reference = probe_logits(peft, probes)
        effect = distance(reference, before)
        if effect.max == 0:
            raise ValueError(
                f"adapter {adapter!r}: has no effect: the logits with and without it are the same; was it trained?"
            )
        try:
            model = peft.merge_and_unload(safe_merge=True)
        except ValueError as damage:
            raise ValueError(f"adapter {adapter!r}: {first_line(damage)}") from None
        before = probe_logits(model, probes)
        error = distance(before, reference)
        share = percent(error.mean, effect.mean)
        log(
            f"adapter: {adapter}: effect mean {effect.mean:.4g}, max {effect.max:.4g}; "
            f"merge error in memory mean {error.mean:.2g}, max {error.max:.2g} = {share} of the effect"
        )
        if error.mean > TOLERANCE * effect.mean:
            raise ValueError(
                f"adapter {adapter!r}: the merge changes the logits by {error.mean:.3g} on average, the adapter by "
                f"{effect.mean:.3g}: {share}, expected at most 1 %; an effect so small is not told apart from rounding "
                "in float32"
            )
        steps.append({"effect": effect, "error": error})
    return model, steps, reference


def write_proven(
    model: Any,
    folder: Path,
    candidates: list[str],
    max_shard_size: str,
    device: str,
    probes: list[torch.Tensor],
    reference: list[torch.Tensor],
    effect: float,
    log: Callable[[str], None],
) -> tuple[str, Distance, list[torch.Tensor]]:
    """Write the model in the first of the precisions with which the proof holds.

    Args:
        candidates: names of dtypes, in order of preference.
        reference: logits of the adapter on its base.
        effect: mean change by the weakest adapter.

    Returns:
        (dtype, error of the files against the reference, their logits).
    """
    for name in candidates:
        save_weights(model, folder, getattr(torch, name), max_shard_size)
        model.to("cpu")  # room for its copy from the disk
        merged = reload_and_compare(model, folder, getattr(torch, name), device, probes)
        error = distance(merged, reference)
        share = percent(error.mean, effect)
        log(
            f"on disk in {name}: error mean {error.mean:.4g}, max {error.max:.4g} = {share} of the weakest effect: "
            + ("the proof holds" if error.mean <= TOLERANCE * effect else "above 1 %, by rounding alone")
        )
        if error.mean <= TOLERANCE * effect:
            if name != candidates[0]:
                log(f"note: kept in {name}, as {candidates[0]} would blur the adapter by more than 1 % of its effect")
            return name, error, merged
        for file in folder.iterdir():
            file.unlink()
    advice = "" if name == "float32" else "; --dtype auto or float32 keeps what was trained"
    raise ValueError(
        f"--dtype {name}: the merged model differs from the adapter on its base by {share} of the adapter's effect "
        f"({error.mean:.3g} of {effect:.3g}), expected at most 1 %{advice}"
    )


def compare_kernels(
    plan: MergePlan,
    kernels: dict[str, Any],
    start: list[torch.Tensor],
    reference: list[torch.Tensor],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Distance between the model merged into and the quantised kernels of the training, for the report.

    Raises:
        ValueError: the dequantised weights cannot be those of the kernels.
    """
    if not kernels:
        return {}
    noise = distance(kernels["base"], start)
    width = spread(start)
    record: dict[str, Any] = {"quantized_kernels_base": asdict(noise)}
    what = f"{plan.quantization[0]}-bit kernels of the training against the weights merged into"
    line = f"{what}: base mean {noise.mean:.4g} ({percent(noise.mean, width)} of the spread)"
    if kernels["adapter"] is not None:
        noise_adapter = distance(kernels["adapter"], reference)
        record["quantized_kernels_adapter"] = asdict(noise_adapter)
        record["quantized_kernels_same_top_token"] = same_top_token(kernels["adapter"], reference)
        effect = distance(reference, start).mean
        share = percent(noise_adapter.mean, effect)
        line += f", with adapter mean {noise_adapter.mean:.4g} ({share} of its effect), max {noise_adapter.max:.4g}"
        line += f", same top token {100 * record['quantized_kernels_same_top_token']:.1f} %"
    log(line)
    if plan.merge_base == "dequantized" and noise.mean > KERNEL_TOLERANCE * width:
        raise ValueError(
            f"base {plan.base!r}: the dequantised weights give logits {percent(noise.mean, width)} of their spread "
            f"away from the {plan.quantization} kernels, expected at most 25 %: they are not what was trained on"
        )
    return record


# Files


def part_tables(model: Any) -> None:
    """Say in the config whether input and output embeddings are one tensor: a trained head may have parted them."""
    head = model.get_output_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return
    if head.weight is not model.get_input_embeddings().weight and not torch.equal(
        head.weight, model.get_input_embeddings().weight
    ):
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def read_generation_config(folder: str, model: Any) -> GenerationConfig:
    """Generation settings of a folder, in a form that can be saved."""
    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:
        config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True  # sampling settings without the switch: files of older versions, refused when saving
    return config


def save_weights(model: Any, folder: Path, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write the model in `dtype`; the float32 weights in memory stay as they are."""
    keep = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        keep += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    exact = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not any(re.search(rf"(^|\.){re.escape(k)}(\.|$)", name) for k in keep):
            exact[name] = (parameter, parameter.data)
            parameter.data = parameter.data.to(dtype)
            if not torch.isfinite(parameter.data).all():
                raise ValueError(
                    f"--dtype {str(dtype)[6:]}: {name} exceeds its range; bfloat16 and float32 have a larger one"
                )
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except OSError as error:
        raise ValueError(f"{folder}: {first_line(error)}") from None
    finally:
        for parameter, data in exact.values():
            parameter.data = data


def reload_and_compare(
    model: Any, folder: Path, dtype: torch.dtype, device: str, probes: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Logits of the model on disk, computed in float32; every tensor must be bit for bit what was merged, rounded."""
    reloaded = load_base(str(folder), torch.float32).requires_grad_(False).eval()
    expected = model.state_dict()
    for name, tensor in reloaded.state_dict().items():
        merged = expected.get(name)
        if merged is None or not (torch.equal(merged.to(dtype).float(), tensor) or torch.equal(merged, tensor)):
            raise ValueError(f"{folder}: {name} read back differs from what was merged")
    return probe_logits(reloaded.to(device), probes)
