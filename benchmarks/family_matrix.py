"""Every model family through every step: a tiny random model is pretrained, tuned, quantised, aligned, merged, asked.

    python -m benchmarks.family_matrix            # prints the table
    python -m benchmarks.family_matrix --write    # and puts it into benchmarks/families.md, which the README points to
    python -m benchmarks.family_matrix --families mixtral,qwen3

The steps are the toolkit's own scripts, called as a user calls them. A cell is "yes" or the reason of a refusal.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from suwen.command_line import build_parser, flag, run, split_dataclasses

TABLE = Path(__file__).with_name("families.md")
STEPS = ("pretraining", "SFT", "LoRA, 4 bit", "DPO", "merge", "generate")
_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_LATENT = _SMALL | {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32,
                    "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}  # fmt: skip
_ONE_GROUP, _TWO_GROUPS = {"n_group": 1, "topk_group": 1}, {"n_group": 2, "topk_group": 1}


@dataclass(frozen=True)
class Entry:
    """One line of the table: the models it stands for, their class, a small config of it, and their template."""

    models: str
    model_type: str
    template: str
    config: dict[str, Any]


FAMILIES = {
    "llama": Entry("LLaMA 1/2/3, Chinese-LLaMA, Ziya, DeepSeek LLM", "llama", "llama2", _GROUPED),
    "baichuan-7b": Entry("Baichuan-7B, Baichuan2-7B (converted)", "llama", "baichuan2", _SMALL),
    "internlm2": Entry("InternLM2 (converted)", "llama", "internlm2", _GROUPED),
    "xverse": Entry("XVERSE (converted)", "llama", "xverse", _SMALL),
    "yi": Entry("Yi", "llama", "yi", _GROUPED),
    "mistral": Entry("Mistral", "mistral", "mistral", _GROUPED),
    "mixtral": Entry("Mixtral 8x7B, 8x22B", "mixtral", "mistral", _GROUPED | {"num_local_experts": 4}),
    "bloom": Entry("BLOOMZ", "bloom", "bloomz", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "cohere": Entry("Command R", "cohere", "cohere", _GROUPED),
    "deepseek_v2": Entry("DeepSeek-V2", "deepseek_v2", "deepseek", _LATENT | _ONE_GROUP),
    "deepseek_v3": Entry("DeepSeek-V3, R1", "deepseek_v3", "deepseek3", _LATENT | _TWO_GROUPS),
    "deepseek-moe": Entry(
        "DeepSeek-MoE-16B (converted)", "qwen2_moe", "deepseek",
        _SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4,
                  "shared_expert_intermediate_size": 64, "mlp_only_layers": [0], "qkv_bias": False},
    ),
    "qwen2": Entry("Qwen 1 (converted), 1.5, 2, 2.5", "qwen2", "qwen", _GROUPED),
    "qwen3": Entry("Qwen3", "qwen3", "qwen3", _GROUPED | {"head_dim": 16}),
    "qwen3_moe": Entry(
        "Qwen3-MoE", "qwen3_moe", "qwen3",
        _GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "qwen3_5": Entry(
        "Qwen3.5", "qwen3_5_text", "qwen3",
        _GROUPED | {"head_dim": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                    "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
    "qwen3_5_moe": Entry(
        "Qwen3.5-MoE", "qwen3_5_moe_text", "qwen3",
        _GROUPED | {"head_dim": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "glm": Entry("ChatGLM2, ChatGLM3, GLM-4-9B (converted)", "glm", "chatglm3", _GROUPED | {"head_dim": 16}),
    "orion": Entry("Orion-14B (converted)", "stablelm", "orion", _SMALL | {"num_key_value_heads": 4}),
    "baichuan-13b": Entry("Baichuan-13B, Baichuan2-13B (converted)", "baichuan", "baichuan2", _SMALL),
    "chatglm": Entry(
        "ChatGLM-6B (converted)", "chatglm", "chatglm",
        {"hidden_size": 64, "inner_hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}  # fmt: skip


def write_model(entry: Entry, folder: Path) -> None:
    """A random model of the family with a tokenizer that holds the control tokens of its template."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

    import suwen.architectures  # noqa: F401  (registers its classes)
    from suwen.embedded import build_embedded_model
    from template import get_template

    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(build_embedded_model())
    template = get_template(entry.template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens(list(template.special_tokens), special_tokens=True)
    tokenizer.chat_template = template.jinja
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    if entry.model_type == "chatglm":
        ids |= {"bos_token_id": tokenizer.convert_tokens_to_ids("<sop>"), "mask_token_id": tokenizer.unk_token_id or 0}
        ids["gmask_token_id"] = tokenizer.convert_tokens_to_ids("[gMASK]")
    window = {"model_max_length": 512} if entry.model_type == "baichuan" else {}
    vocabulary = -(-len(tokenizer) // 32) * 32  # bitsandbytes on some CPUs needs multiples of 32
    config = CONFIG_MAPPING[entry.model_type](vocab_size=vocabulary, **entry.config, **ids, **window)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        tokenizer.eos_token_id,
        ids["pad_token_id"],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_family(name: str, folder: Path) -> dict[str, str]:
    """What each step gave: "yes", or the first line of the refusal."""
    import torch
    from transformers import AutoTokenizer

    import dpo_training
    import merge_peft_adapter
    import pretraining
    import supervised_finetuning
    from suwen.models import load_causal_lm

    write_model(FAMILIES[name], folder / "base")
    common = {
        "max_steps": 2, "max_length": 384, "max_train_samples": 24, "max_eval_samples": 2, "num_proc": 1,
        "gradient_accumulation_steps": 1, "save_strategy": "no", "report_to": "none", "cache_dir": folder / "cache",
        "disable_tqdm": True, "on_bad_rows": "skip",
    }  # fmt: skip
    lora = ["--use_peft", "True", "--quantization", "4bit"]

    def train(main: Any, stage: str, start: str, data: str, *more: str) -> None:
        options = {"model_name_or_path": folder / start, "train_file_dir": data, "output_dir": folder / stage, **common}
        main([*(word for flag_name, value in options.items() for word in (f"--{flag_name}", str(value))), *more])

    def generate() -> None:
        model = load_causal_lm(str(folder / "merged"), "float32").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "发热怎么办？"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        written = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        if written.shape[1] != prompt["input_ids"].shape[1] + 4 or not torch.isfinite(written.float()).all():
            raise ValueError(f"generated {written.shape[1]} tokens")

    def merge() -> None:
        merge_peft_adapter.main(["--lora_model", str(folder / "dpo"), "--output_dir", str(folder / "merged")])

    steps = {
        "pretraining": lambda: train(pretraining.main, "pt", "base", "data/pretrain"),
        "SFT": lambda: train(supervised_finetuning.main, "sft-full", "base", "data/sft"),
        "LoRA, 4 bit": lambda: train(supervised_finetuning.main, "sft", "base", "data/sft", *lora),
        "DPO": lambda: train(dpo_training.main, "dpo", "sft", "data/preference", *lora),
        "merge": merge,
        "generate": generate,
    }
    found = dict.fromkeys(steps, "-")
    for step, action in steps.items():
        try:
            action()
            found[step] = "yes"
        except ValueError as error:
            found[step] = " ".join(str(error).split())
            if step not in ("pretraining", "SFT"):  # the others stand on each other
                break
    return found


def table(results: dict[str, dict[str, str]]) -> list[str]:
    """Lines of a Markdown table, a line for each family."""
    lines = [f"| Models | Class | {' | '.join(STEPS)} |", "|---|---|" + "---|" * len(STEPS)]
    for name, found in results.items():
        cells = [FAMILIES[name].models, f"`{FAMILIES[name].model_type}`", *(found[step] for step in STEPS)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


PAGE = """# Model families

Written by `python -m benchmarks.family_matrix --write`, not by hand: a tiny random model of each class goes through the
scripts that a user calls, each step on the result of the one before. `tests/test_families.py` holds every cell.

{table}

{versions}. 4 bit leaves the stacked experts of mixtures (Mixtral, Qwen3-MoE, DeepSeek) in 16 bits; the stages say how
many weights these are. "(converted)": by `tools/convert_checkpoint.py`, to a class that needs no code of the model's
own.
"""


def page(results: dict[str, dict[str, str]]) -> str:
    """The table with the versions that it was made with."""
    from suwen.records import versions

    known = versions()
    made_with = ", ".join(f"{name} {known[name]}" for name in ("torch", "transformers", "peft") if name in known)
    return PAGE.format(table="\n".join(table(results)), versions=made_with)


@dataclass
class MatrixArguments:
    families: str = flag("", "names, comma-separated; unset: all")
    output_file: str | None = flag(None, "write the results as JSON too")
    write: bool = flag(False, "put the table of all families into benchmarks/families.md")


def main(argv: list[str] | None = None) -> None:
    (args,) = split_dataclasses(build_parser(__doc__ or "", MatrixArguments).parse_args(argv), MatrixArguments)
    names = [name for name in args.families.split(",") if name] or list(FAMILIES)
    if args.write and names != list(FAMILIES):
        raise ValueError("--write: the table holds all families, leave out --families")
    if unknown := [name for name in names if name not in FAMILIES]:
        raise ValueError(f"--families: found {unknown[0]!r}, expected some of {', '.join(FAMILIES)}")
    from suwen.stage import quiet_libraries

    quiet_libraries()
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            results[name] = run_family(name, Path(folder))
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    print("\n".join(table(results)))
    if args.write:
        TABLE.write_text(page(results), encoding="utf-8")
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
