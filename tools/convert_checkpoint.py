"""Convert a checkpoint whose architecture needs code from its folder to a class that needs none, once.

    python tools/convert_checkpoint.py --model_name_or_path Baichuan2-7B-Chat --output_dir baichuan2-7b --verify
    python tools/convert_checkpoint.py --model_name_or_path my-lora --base_model baichuan2-7b --output_dir new-lora

Baichuan 1 and 2, InternLM2, Qwen 1, ChatGLM 1 to 3, GLM-4-9B (old layout), XVERSE, Yi, Orion and DeepSeek-MoE. A model
of a native class, or a LoRA adapter on one, with .bin weights or a bare tokenizer.model (Chinese-LLaMA, QiZhen) becomes
safetensors with a tokenizer that cuts as sentencepiece does. The weights are read shard by shard and keep their
precision, the tokenizer is checked line by line against the original, and nothing is written where something does not
fit.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses
from suwen.conversion import FamilyName


@dataclass
class ConversionArguments:
    model_name_or_path: str = flag("", "folder of the original model, or of a LoRA adapter on it (with --base_model)")
    output_dir: str = flag("", "new or empty folder")
    base_model: str | None = flag(
        None, "for a LoRA adapter: the folder that its base was converted to, or a base that needs no conversion"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = flag(None, "precision of the weights; unset: as they are")
    family: FamilyName | None = flag(None, "family, where config.json does not tell it")
    verify: bool = flag(
        False,
        "compare with the original forward pass in float32 (memory: the model in float32, read once more by layer)",
    )
    sample_file: str | None = flag(None, "text on which the tokenizers must agree, besides the project's own samples")
    max_shard_size: str = flag("4GB", "largest weight file, such as 500MB or 4GB")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__ or "", ConversionArguments)
    (args,) = split_dataclasses(parser.parse_args(argv), ConversionArguments)
    for name in ("model_name_or_path", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name}: found nothing, expected a folder")
    if not Path(args.model_name_or_path).is_dir():
        raise ValueError(
            f"--model_name_or_path {args.model_name_or_path}: found no such folder; download the model first"
        )
    if args.base_model:
        defaults = ConversionArguments()
        for name in ("dtype", "family", "verify", "max_shard_size"):
            if getattr(args, name) != getattr(defaults, name):
                raise ValueError(f"--{name}: is for models, found it with --base_model, which converts a LoRA adapter")
    if args.sample_file and not Path(args.sample_file).is_file():
        raise ValueError(f"--sample_file {args.sample_file}: found no such file, expected a text")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    from suwen.conversion.convert import convert_checkpoint, convert_lora

    try:
        lines = Path(args.sample_file).read_text(encoding="utf-8").splitlines() if args.sample_file else []
    except UnicodeDecodeError as error:
        raise ValueError(f"--sample_file {args.sample_file}: {error}, expected UTF-8 text") from None
    if args.base_model:
        convert_lora(args.model_name_or_path, args.base_model, args.output_dir, lines)
        return
    convert_checkpoint(
        args.model_name_or_path, args.output_dir, args.family, args.dtype, args.verify, args.max_shard_size, lines
    )


if __name__ == "__main__":
    run(main)
