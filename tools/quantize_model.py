"""Export a model in 8 or 4 bits, with what that costs: perplexity and exam accuracy before and after.

    python tools/quantize_model.py --model_name_or_path outputs/merged --quantization 4bit --output_dir outputs/nf4
    python inference.py --base_model outputs/nf4 --interactive

The folder holds bitsandbytes weights (LLM.int8, or NF4 with double quantisation) as safetensors; transformers, vLLM and
every script here load it as it is. What is measured is the folder read back from the disk. A LoRA folder is merged
first (merge_peft_adapter.py); training on quantised weights needs no export (--quantization of the stages).

Not written: GPTQ (gptqmodel 7.7 needs torch 2.14.1 or newer), AWQ (autoawq is no longer kept up and needs triton,
llmcompressor 0.14 needs transformers 5.17 or older), GGUF (the gguf package reads and writes files but knows no models;
llama.cpp's own convert_hf_to_gguf.py takes the unquantised folder), 2 bits (no format that other programs read).
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses

RECORD = "quantization.json"


@dataclass
class QuantizeArguments:
    model_name_or_path: str = flag("", "model folder or hub name, unquantised")
    output_dir: str = flag("", "new or empty folder")
    quantization: Literal["8bit", "4bit"] = flag("4bit", "LLM.int8, or NF4 with double quantisation")
    tasks: str = flag("general_text,exam", "benchmarks asked before and after by likelihood (see evaluation.py)")
    data_dir: str | None = flag(None, "files of these benchmarks; unset: the project's own small sets")
    max_samples: int | None = flag(None, "at most so many items of a benchmark")
    max_shard_size: str = flag("4GB", "largest weight file, such as 500MB or 4GB")
    use_cpu: bool = flag(False, "compute on the CPU even where there is a GPU")


def main(argv: list[str] | None = None) -> None:
    (args,) = split_dataclasses(build_parser(__doc__ or "", QuantizeArguments).parse_args(argv), QuantizeArguments)
    for name in ("model_name_or_path", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name}: found nothing, expected a folder")
    if args.use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    export(args)


def export(args: QuantizeArguments) -> dict[str, Any]:
    """Measure, quantise, save, read back, measure again; nothing is left behind where one of these fails."""
    from suwen.adapters import check_output_dir
    from suwen.conversion.convert import parse_size, publish
    from suwen.evaluate import find_task_files, parse_tasks
    from suwen.lineage import is_adapter_dir, weights_fingerprint
    from suwen.memory import amount
    from suwen.models import load_config, load_tokenizer
    from suwen.records import versions, write_json

    parse_size(args.max_shard_size)  # a mistake in it is told now, not at the end
    source = args.model_name_or_path
    if Path(source).is_dir() and is_adapter_dir(source):
        raise ValueError(f"--model_name_or_path {source}: is a LoRA folder; merge it first with merge_peft_adapter.py")
    if getattr(load_config(source), "quantization_config", None):
        raise ValueError(f"--model_name_or_path {source}: is quantised already, expected the model it was made from")
    for task in parse_tasks(args.tasks):
        if "likelihood" not in task.modes:
            raise ValueError(
                f"--tasks {task.name}: is not scored by likelihood, expected tasks such as exam,general_text"
            )
        find_task_files(task, args.data_dir, {})
    target = check_output_dir(args.output_dir, [source])
    tokenizer = load_tokenizer(source)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-unfinished-", dir=target.parent))
    try:
        before = measure(source, "before", args)
        stored = write_quantised(source, unfinished, args, tokenizer)
        after = measure(str(unfinished), "after", args)
        record = {
            "source": source, "source_fingerprint": weights_fingerprint(source), "quantization": args.quantization,
            "bytes": stored, "before": before, "after": after, "versions": versions(),
        }  # fmt: skip
        write_json(unfinished / RECORD, record)
        publish(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print("\n".join(table(before, after)))
    print(f"weights: {amount(stored)}; wrote {target}")
    return record


def write_quantised(source: str, folder: Path, args: QuantizeArguments, tokenizer: Any) -> int:
    """Save the quantised model with its tokenizer; returns the bytes of its weights."""
    import torch

    from suwen.models import load_base

    gpu = torch.cuda.is_available()
    compute = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    model = load_base(source, "auto", args.quantization, compute, "cuda" if gpu else "cpu")
    model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(folder: str, title: str, args: QuantizeArguments) -> dict[str, float]:
    """Each task's metrics on a folder as it is served: {"general_text: perplexity per character": 12.3, ...}."""
    from suwen.evaluate import Settings, evaluate_stage

    with tempfile.TemporaryDirectory() as records:
        settings = Settings(modes=("likelihood",), max_samples=args.max_samples)
        found = evaluate_stage(folder, args.tasks, Path(records) / title, data_dir=args.data_dir, settings=settings)
    return {
        f"{name}: {metric}": float(value["value"])
        for name, task in found["results"]["tasks"].items()
        for metric, value in task["modes"]["likelihood"]["metrics"].items()
    }


def table(before: dict[str, float], after: dict[str, float]) -> list[str]:
    widest = max(map(len, before))
    rows = [f"{name:<{widest}}  {before[name]:>10.4g}  {after[name]:>10.4g}" for name in before]
    return [f"{'':<{widest}}  {'before':>10}  {'after':>10}", *rows]


if __name__ == "__main__":
    run(main)
