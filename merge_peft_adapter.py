"""Merge LoRA adapters into their base model, and prove that the result is what was trained.

    python merge_peft_adapter.py --lora_model outputs/sft --output_dir outputs/sft-merged
    python merge_peft_adapter.py --base_model Qwen/Qwen3-8B --lora_model outputs/sft,outputs/dpo --output_dir merged

Without --base_model the base recorded by the first adapter is taken, with the adapters that it stands on. An adapter
trained on an 8- or 4-bit base is merged into the dequantised base. On probe inputs the merged model, read back from the
disk, must differ from the adapter on its base by at most 1 % of what the adapter changes; otherwise nothing is written.
"""

import os
from dataclasses import dataclass
from typing import Literal

from suwen.command_line import build_parser, flag, run, split_dataclasses


@dataclass
class MergeArguments:
    lora_model: str = flag("", "LoRA folders, comma-separated, merged in this order")
    output_dir: str = flag("", "new or empty folder for the merged model")
    base_model: str | None = flag(None, "model folder, hub name or LoRA folder; unset: what the first adapter records")
    tokenizer_path: str | None = flag(
        None, "tokenizer folder; unset: that of the last adapter that has one, else the base's"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag(
        "auto", "precision of the saved weights; auto: the base's where the proof holds with it, else float32"
    )
    merge_base: Literal["dequantized", "original"] = flag(
        "dequantized",
        "for adapters trained on a quantised base: merge into it as trained, or into the original weights",
    )
    quantization: Literal["none", "8bit", "4bit", "2bit"] | None = flag(
        None, "quantisation of the base in the training; unset: as the adapter's run.json says, else none"
    )
    max_shard_size: str = flag("4GB", "largest weight file, such as 500MB or 4GB")
    use_cpu: bool = flag(False, "compute on the CPU even where there is a GPU")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__ or "", MergeArguments)
    (args,) = split_dataclasses(parser.parse_args(argv), MergeArguments)
    adapters = [name.strip() for name in args.lora_model.split(",") if name.strip()]
    if not adapters:
        raise ValueError("--lora_model: found nothing, expected one or more LoRA folders, comma-separated")
    if not args.output_dir:
        raise ValueError("--output_dir: found nothing, expected a folder for the merged model")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if args.use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    from suwen.merging import merge_adapters

    merge_adapters(
        args.base_model,
        adapters,
        args.output_dir,
        tokenizer_path=args.tokenizer_path,
        dtype=args.dtype,
        merge_base=args.merge_base,
        quantization=args.quantization,
        max_shard_size=args.max_shard_size,
        device="cpu" if args.use_cpu else None,
    )


if __name__ == "__main__":
    run(main)
