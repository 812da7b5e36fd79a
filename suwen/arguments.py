"""Command line of the stage scripts: our flags, the library's flags, and the names that older launchers hold.

Standard library only, so that `--help` and mistakes in our own flags are answered before torch loads.
The training library's own flags (learning rate, batch size, ...) are handed to its config class afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import functools
import os
import re
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn


def flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    model_name_or_path: str | None = flag(
        None,
        "model folder, hub name, or a LoRA folder to go on from; unset: the finished stage before this one in"
        " --outputs, else the embedded model",
    )
    tokenizer_name_or_path: str | None = flag(None, "tokenizer folder or hub name; unset: the model's own")
    quantization: Literal["none", "8bit", "4bit", "2bit"] = flag(
        "none", "load the frozen base in bitsandbytes int8 or NF4, or in two bits (HQQ), with --use_peft"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "weights in memory; auto: float32 for what is trained, the compute precision for what is frozen"
    )
    pure_bf16: bool = flag(False, "train bfloat16 weights without float32 masters (least memory)")
    attn_implementation: str | None = flag(None, "sdpa (default), eager, or another one known to transformers")
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = flag(
        None, "stretch RoPE so that --max_length fits; the factor follows from the model's own window"
    )
    shift_attn: bool = flag(
        False,
        "train long rows with shifted sparse attention (S2-Attn, LongLoRA), in groups of a quarter of --max_length;"
        " evaluation and the result have full attention (pt and sft; the paper also trains embed_tokens and norm)",
    )
    router_aux_loss_coef: float | None = flag(
        None,
        "weight of the loss that keeps experts in even use; unset: the model's own in full training, 0 with LoRA, which"
        " leaves routers as they are",
    )
    outputs: str = flag("outputs", "where finished stages are looked for when --model_name_or_path is unset")


@dataclass
class DataArguments:
    train_file_dir: str | None = flag(None, "files or folders, comma-separated, each with an optional weight: a:0.3,b")
    validation_file_dir: str | None = flag(None, "held-out files or folders; unset: split off the training data")
    template_name: str = flag("auto", "prompt template; auto: the tokenizer's own chat template")
    thinking: Literal["auto", "on", "off"] = flag(
        "auto", "thinking mode of the prompts; auto: on for answers that carry reasoning, off for the others"
    )
    columns: str | None = flag(None, "names for a table of your own, e.g. prompt=ask,response=answer")
    max_length: int | Literal["auto"] | None = flag(
        None, "tokens in a row (1024, or the model's window if that is shorter); auto: as many as fit into memory"
    )
    packing: bool = flag(True, "several rows in one sequence, each isolated from the others (pretraining and SFT)")
    train_on_inputs: bool = flag(False, "train on the prompts too, not on the answers alone")
    max_train_samples: int | None = flag(None, "train on a seeded random choice of so many rows")
    max_eval_samples: int | None = flag(None, "evaluate on a seeded random choice of so many rows")
    validation_split_fraction: float = flag(
        0.05, "share of the training prompts held out when no validation files are given"
    )
    on_bad_rows: Literal["error", "skip"] = flag(
        "error", "stop at a bad row, or count it and write rejected_rows.jsonl"
    )
    num_proc: int | None = flag(None, "worker processes that tokenise (all cores)")
    cache_dir: str | None = flag(None, "tokenised data, by content (.cache/suwen beside the scripts)")
    data_seed: int = flag(42, "seed of sampling and splitting")


@dataclass
class LoraArguments:
    use_peft: bool = flag(False, "train a LoRA adapter instead of all weights")
    target_modules: str = flag("all", "all (every linear layer but the head), or names, comma-separated")
    lora_rank: int = flag(8, "rank r of the adapter")
    lora_alpha: float = flag(16.0, "the adapter's effect is scaled by alpha / r")
    lora_dropout: float = flag(0.05, "dropout before the adapter")
    modules_to_save: str | None = flag(None, "modules trained in full beside the adapter, e.g. embed_tokens,lm_head")


@dataclass
class PreferenceArguments:
    beta: float | None = flag(
        None,
        "how strongly the model is held to its start; for ipo its tau (0.1 as in arXiv:2305.18290; for sigmoid_norm 5"
        " as in arXiv:2411.15124)",
    )
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm"] = flag(
        "sigmoid", "sigmoid is DPO; sigmoid_norm the same with log-probabilities averaged over tokens"
    )
    label_smoothing: float = flag(0.0, "share of pairs that may be labelled the wrong way round (sigmoid, robust)")
    sft_weight: float = flag(0.0, "weight of the better answer's own loss a token, added (RPO, arXiv:2404.19733)")

    def __post_init__(self) -> None:
        if self.beta is None:
            self.beta = 5.0 if self.loss_type == "sigmoid_norm" else 0.1


@dataclass
class OddsRatioArguments:
    orpo_lambda: float = flag(0.1, "weight of the odds ratio beside the better answer's own loss (arXiv:2403.07691)")

    def __post_init__(self) -> None:
        if not self.orpo_lambda >= 0:
            raise ValueError(f"--orpo_lambda: found {self.orpo_lambda}, expected 0 or more")


@dataclass
class RewardArguments:
    centering: float = flag(
        0.01, "weight of the squared sum of a pair's scores, which holds scores around 0 (arXiv:2312.09244)"
    )
    margin_scale: float = flag(
        0.0, "the better answer must be ahead by its row's margin times this (Llama 2, arXiv:2307.09288, eq. 2)"
    )

    def __post_init__(self) -> None:
        for name in ("centering", "margin_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name}: found {getattr(self, name)}, expected 0 or more")


REWARD_RULES = ("exam", "format", "length", "repetition", "language")  # see `suwen.rewards`


@dataclass
class PolicyArguments:
    algorithm: Literal["ppo", "rloo", "grpo"] = flag("ppo", "rloo and grpo have no critic and share the rest")
    reward: str | None = flag(
        None,
        "what answers earn, with weights: exam, format, length, repetition, language, model:FOLDER; unset: the finished"
        " reward model in --outputs",
    )
    held_out_reward: str | None = flag(
        None, "the same form, measured at evaluations and never trained on; the run stops where it falls"
    )
    reward_quantization: Literal["none", "8bit", "4bit", "2bit"] = flag("none", "how reward models are loaded")
    num_generations: int | None = flag(None, "answers to each prompt of an update (ppo 1, rloo 4, grpo 8)")
    max_new_tokens: int = flag(256, "tokens of an answer, at most; those that --max_length leaves are for the prompt")
    temperature: float = flag(1.0, "of the answers that are trained on")
    shuffle_options: bool = flag(True, "options of exam questions in a new order in each epoch")
    num_ppo_epochs: int | None = flag(None, "passes over the answers of an update (ppo 4, rloo and grpo 1)")
    num_mini_batches: int = flag(1, "optimiser steps in a pass")
    kl_coef: float = flag(0.05, "penalty a nat between policy and reference; where it begins, with --target_kl")
    target_kl: float | None = flag(
        None, "nats an answer that the penalty is adapted to (Ziegler et al. 2019); unset: a fixed penalty"
    )
    kl_estimator: Literal["k1", "k3"] | None = flag(None, "of the KL at a token (ppo and rloo k1, grpo k3)")
    cliprange: float = flag(0.2, "how far a token's probability ratio may move in an update")
    cliprange_value: float = flag(0.2, "how far a value may move in an update")
    vf_coef: float = flag(0.1, "weight of the critic's loss")
    entropy_coef: float = flag(0.0, "weight of an entropy bonus")
    gamma: float = flag(1.0, "discount a token")
    lam: float = flag(0.95, "lambda of GAE")
    whiten_advantages: bool = flag(True, "advantages of an update to mean 0 and variance 1, over all ranks")
    missing_eos_penalty: float = flag(1.0, "taken from the score of an answer that did not end")
    total_episodes: int | None = flag(None, "answers drawn in all, in the place of epochs")
    generation_batch_size: int = flag(32, "answers that a process draws at once")
    rollout_server: str | None = flag(
        None, "OpenAI-compatible server that draws the answers and takes adapters while it runs (vLLM)"
    )
    alarm_kl: float = flag(30.0, "stop beyond so many nats an answer; 0 switches an alarm off")
    alarm_entropy: float = flag(0.02, "stop where entropy falls below this share of its start without a gain in score")
    alarm_length: float = flag(0.1, "stop where answers shrink below this share of their length at the start")
    alarm_repetition: float = flag(0.3, "stop where the share of repeated 4-grams has risen by more")
    alarm_truncation: float = flag(0.5, "stop where the share of answers without an end has risen by more")
    alarm_patience: int = flag(5, "updates, or evaluations, that a sign must last")


@dataclass
class RunArguments:
    output_dir: str = flag("", "everything that the run leaves")
    logging_dir: str | None = flag(None, "TensorBoard logs (tensorboard in the output folder)")
    resume: str = flag(
        "auto", "auto: go on from the newest checkpoint that verifies; never: start anew; or a checkpoint folder"
    )
    resume_force: bool = flag(False, "go on although data, model or arguments are not those of the checkpoint")
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "at a loss or gradient that is no number: stop and name the rows, or leave the step out and go on"
    )
    eval_tasks: str | None = flag(
        None, "benchmarks that the result is asked, e.g. own or cmexam,huatuo (see evaluation.py), into <output>/eval"
    )
    eval_tasks_steps: int | None = flag(
        None, "ask them every so many optimiser steps too, into <output>/eval/step-N (other processes wait meanwhile)"
    )
    eval_data_dir: str | None = flag(None, "files of these benchmarks; unset: the project's own small sets")
    eval_task_samples: int | None = flag(None, "at most so many items of a benchmark, always the same")
    dry_run: bool = flag(
        False, "print the memory plan, what the data is and how many steps there are; train and write nothing"
    )

    @property
    def written_to(self) -> str | None:
        """The output folder; None in a dry run, which leaves it alone."""
        return None if self.dry_run else self.output_dir


@dataclass
class StageArguments:
    """What a stage script works with; the library's own flags stay as given until its config class is known."""

    stage: str
    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    run: RunArguments
    own: Any  # the stage's own arguments, None for stages without
    library_flags: list[str]
    command: list[str]
    outlook: Any = None  # the memory plan of the run (`suwen.memory.Outlook`), once its data is known


# Library flags worth a line in --help; every other field of the library's config class is accepted too.
LIBRARY_HELP = {
    "do_train": "train (default when neither --do_train nor --do_eval is given)",
    "do_eval": "evaluate at the end",
    "num_train_epochs": "passes over the data",
    "max_steps": "stop after so many optimiser steps",
    "learning_rate": "peak learning rate",
    "per_device_train_batch_size": "sequences in a micro-batch; auto: as many as fit, accumulated accordingly",
    "gradient_accumulation_steps": "micro-batches in an optimiser step",
    "lr_scheduler_type": "cosine, linear, constant, ...",
    "warmup_steps": "steps, or a share of all steps when below 1",
    "weight_decay": "AdamW's decoupled weight decay",
    "bf16": "bfloat16 mixed precision (default where the hardware has it)",
    "fp16": "float16 with loss scaling (default on GPUs below compute capability 8.0)",
    "gradient_checkpointing": "recompute activations to save memory (default: auto, where they do not fit)",
    "neftune_noise_alpha": "NEFTune noise on the embeddings",
    "logging_steps": "optimiser steps between two log lines",
    "eval_steps": "optimiser steps between two evaluations",
    "save_steps": "optimiser steps between two checkpoints",
    "save_total_limit": "checkpoints kept",
    "seed": "seed of the training",
    "use_cpu": "train on the CPU even where there is a GPU",
    "deepspeed": "DeepSpeed configuration file",
}

# Library flags that may be `auto`: the stage settles them by its memory plan (`suwen.planning`).
AUTOMATIC = ("per_device_train_batch_size", "gradient_checkpointing")

# Old names (MedicalGPT's, transformers 4's) whose meaning is the same today.
RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "max_seq_length": "max_length",
    "model_max_length": "max_length",
    "block_size": "max_length",
    "neft_alpha": "neftune_noise_alpha",
    "no_cuda": "use_cpu",
    "preprocessing_num_workers": "num_proc",
    "tokenizer_path": "tokenizer_name_or_path",
    "resume_from_checkpoint": "resume",
    "train_file": "train_file_dir",
    "rpo_alpha": "sft_weight",
    "orpo_beta": "orpo_lambda",
    "center_rewards_coefficient": "centering",
    "validation_file": "validation_file_dir",
    "sft_model_path": "model_name_or_path",
    "response_length": "max_new_tokens",
    "init_kl_coef": "kl_coef",
    "rloo_k": "num_generations",
}
# Old switches that today's defaults already are: accepted with this value, refused with any other.
SETTLED = {
    "save_safetensors": ("true", "weights are always saved as safetensors"),
    "trust_remote_code": ("false", "code from a model folder never runs; convert the checkpoint to a native class"),
    "ignore_pad_token_for_loss": ("true", "padding never counts in the loss"),
    "use_fast_tokenizer": ("true", "tokenizers are always the fast ones"),
    "ddp_find_unused_parameters_in_peft": ("false", "not needed"),
}
# Old switches without effect on the result: dropped with a notice.
DROPPED = {
    "streaming": "text is always read as a stream",
    "overwrite_cache": "the cache is addressed by content, so it cannot be stale",
    "preprocessing_only": "the data is always prepared before training",
    "device_map": "the launcher places the model",
    "include_tokens_per_second": "tokens per second are always in run.json",
}
# Old names without an equivalent: refused with what to do instead.
REMOVED = {
    "peft_path": "give the adapter folder as --model_name_or_path",
    "flash_attn": "choose with --attn_implementation; packing needs no flash-attn package",
    "use_flash_attention_2": "choose with --attn_implementation",
    "dataset_name": "give local files by --train_file_dir",
    "dataset_config_name": "give local files by --train_file_dir",
    "max_prompt_length": "one limit for prompt and answer: --max_length",
    "max_completion_length": "one limit for prompt and answer: --max_length",
    "loss_weights": "one --loss_type, with --sft_weight for the term of the better answer",
    "precompute_ref_log_probs": "the reference is always computed once, before the first step",
    "padding_free": "rows are always computed without padding where the model can",
    "generate_during_eval": "not available",
    "whiten_rewards": "advantages are whitened, --whiten_advantages; scores are not",
    "stop_token": "an answer ends with the stop token of its template",
    "num_sample_generations": "answers of each update are in samples.jsonl",
    "value_model_path": "the critic stands on the policy's backbone and begins with the head of the reward model",
    "local_rollout_forward_batch_size": "scoring is packed up to --max_length; see --generation_batch_size",
    "normalize_advantage": "use --whiten_advantages",
    "normalize_reward": "advantages are whitened, --whiten_advantages; scores are not",
    "label_pad_token_id": "labels are masked with -100 always",
    "tool_format": "tool calls are not part of this version",
    "fp16_opt_level": "removed from transformers; use --fp16",
    "fp16_backend": "removed from transformers; use --fp16",
    "half_precision_backend": "removed from transformers; use --bf16 or --fp16",
    "sharded_ddp": "removed from transformers; use CONFIG=zero2 or CONFIG=fsdp2",
    "adafactor": "use --optim adafactor",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "past_index": "removed from transformers",
    "jit_mode_eval": "removed from transformers",
    "use_ipex": "removed from transformers",
    "torchdynamo": "use --torch_compile",
    "use_mps_device": "removed from transformers",
    "tpu_num_cores": "removed from transformers",
}


def pairs_of(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Split a command line into (flag name without dashes, its values); leading stray words get the name ""."""
    pairs: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            pairs.append((name.replace("-", "_"), [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            pairs.append(("", [word]))
    return pairs


def is_true(values: list[str]) -> bool:
    return not values or values[0].lower() in {"true", "1", "yes"}


def translate_old_flags(argv: list[str], notice: Callable[[str], None] = lambda line: None) -> list[str]:
    """Replace old flag names by today's, drop what has become the default, refuse what has no equivalent."""
    pairs = pairs_of(argv)
    given = {name for name, _ in pairs}
    lengths = 0
    result: list[str] = []
    for name, values in pairs:
        if name in {"max_source_length", "max_target_length"}:
            try:
                lengths += int(values[0])
                if name == "max_source_length":  # PPO's launcher calls the other part of a row so
                    lengths += int((dict(pairs).get("response_length") or ["0"])[0])
            except (IndexError, ValueError):
                raise ValueError(
                    f"--{name}: found {' '.join(values) or 'nothing'}, expected a number of tokens"
                ) from None
            continue
        if name in {"load_in_4bit", "load_in_8bit"}:
            if is_true(values):
                result += ["--quantization", name.removeprefix("load_in_")]
            continue
        if name == "qlora":
            if is_true(values):
                if not given & {"load_in_4bit", "load_in_8bit", "quantization"}:
                    raise ValueError("--qlora: name the width, --quantization 4bit or --quantization 8bit")
                result += ["--use_peft", "True"]
            continue
        if name == "reward_model_path":
            if "reward" in given:
                raise ValueError("--reward_model_path and --reward: give --reward model:FOLDER=1.0 alone")
            result += ["--reward", f"model:{' '.join(values)}=1.0"]
            continue
        if name == "overwrite_output_dir":
            result += ["--resume", "never"] if is_true(values) else []
            continue
        if name == "resume_from_checkpoint" and (not values or values[0].lower() in {"true", "false"}):
            result += ["--resume", "auto" if is_true(values) else "never"]
            continue
        if name == "group_by_length":
            result += ["--train_sampling_strategy", "group_by_length"] if is_true(values) else []
            continue
        if name == "validation_split_percentage":
            try:
                result += ["--validation_split_fraction", str(float(values[0]) / 100)]
            except (IndexError, ValueError):
                found = " ".join(values) or "nothing"
                raise ValueError(f"--{name}: found {found}, expected a number, 0 to below 100") from None
            continue
        if name in SETTLED:
            expected, reason = SETTLED[name]
            if is_true(values) != (expected == "true"):
                raise ValueError(f"--{name} {' '.join(values)}: not possible, {reason}")
            continue
        if name in DROPPED:
            notice(f"--{name} has no effect: {DROPPED[name]}")
            continue
        if name in REMOVED:
            if values and values[0].lower() in {"false", "none"}:
                continue
            raise ValueError(f"--{name} is not available: {REMOVED[name]}")
        if name in RENAMED:
            new = RENAMED[name]
            if new in given:
                raise ValueError(f"--{name} and --{new} mean the same: give one of them")
            notice(f"--{name} is called --{new} today")
            name = new
        result += ["--" + name if name else "", *values] if name else values
    if lengths:
        if "max_length" in given:
            raise ValueError("--max_source_length, --max_target_length and --max_length: give --max_length alone")
        result += ["--max_length", str(lengths)]
    return result


def parse_bool(text: str) -> bool:
    if text.lower() in {"true", "1", "yes"}:
        return True
    if text.lower() in {"false", "0", "no"}:
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")


def parse_or_word(kind: type, words: tuple[str, ...], text: str) -> Any:
    """A word as it is, else a value of `kind`."""
    if text in words:
        return text
    try:
        return kind(text)
    except ValueError:
        expected = " or ".join([f"{kind.__name__} value", *words])
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}") from None


NEITHER_TRAINED_NOR_WRITTEN = {
    "gptq": "gptqmodel needs a newer torch than is pinned; expected 8bit or 4bit (in training also 2bit)",
    "awq": "autoawq is no longer kept up; expected 8bit or 4bit (in training also 2bit)",
    "gguf": "its package knows no models; train with 4bit, merge, and give the folder to llama.cpp's "
    "convert_hf_to_gguf.py",
}


# What the library divides by, or multiplies with, without a look at it
ABOVE_ZERO = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "logging_steps", "eval_steps", "save_steps",
)  # fmt: skip
NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers")


class OneLineParser(argparse.ArgumentParser):
    """A parser of whole names alone, whose mistakes are a ValueError of one line instead of a usage page."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument (--\w*quantization): invalid choice: '(\w+)'", message)
        if found and (reason := NEITHER_TRAINED_NOR_WRITTEN.get(found[2].lower())):
            raise ValueError(f"{found[1]}: found {found[2]}, which is neither trained nor exported here: {reason}")
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ", 1)[1].split()[0]
            raise ValueError(unknown_flag(word, self._option_string_actions))
        raise ValueError(message.removeprefix("argument "))


def unknown_flag(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f"unknown flag or value {word!r}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def add_dataclass(parser: argparse._ArgumentGroup, cls: type) -> None:
    """Add one flag for each field of a dataclass; types: str, int, float, bool, Literal, each or None, or a word."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        words: tuple[str, ...] = ()
        if typing.get_origin(hint) in {typing.Union, types.UnionType}:
            first, *others = (part for part in typing.get_args(hint) if part is not type(None))
            words = tuple(word for part in others for word in typing.get_args(part))
            hint = first
        text = item.metadata.get("help", "").replace("%", "%%")
        options: dict[str, Any] = {"default": item.default, "help": text}
        if hint is bool:
            options |= {"type": parse_bool, "nargs": "?", "const": True, "metavar": "True|False"}
        elif typing.get_origin(hint) is Literal:
            options |= {"choices": typing.get_args(hint)}
        elif words:
            options |= {"type": functools.partial(parse_or_word, hint, words)}
            options["metavar"] = "|".join([hint.__name__.upper(), *words])
        else:
            options |= {"type": hint, "metavar": hint.__name__.upper()}
        if item.default not in (None, ""):
            options["help"] += f" (default: {item.default})"
        parser.add_argument(f"--{item.name}", **options)


def build_parser(description: str, *classes: type) -> OneLineParser:
    parser = OneLineParser(
        usage="%(prog)s [--flag value ...]",
        description=description,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=120),
    )
    for cls in classes:
        add_dataclass(parser.add_argument_group(cls.__name__.removesuffix("Arguments").lower()), cls)
    return parser


def split_dataclasses(namespace: argparse.Namespace, *classes: type) -> list[Any]:
    return [cls(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls)}) for cls in classes]


def parse_stage_arguments(
    argv: list[str] | None, stage: str, description: str, defaults: dict[str, Any], own: type | None = None
) -> StageArguments:
    """Parse a stage's command line up to the library's own flags.

    Args:
        argv: words after the script's name; None takes them from sys.argv.
        stage: short name of the stage (pt, sft, dpo); the output folder is outputs/<stage> by default.
        description: shown by --help.
        defaults: the library flags whose default this stage sets, for --help.
        own: dataclass of arguments that only this stage has.

    Raises:
        ValueError: an unknown value, or an old name without equivalent; one line each.
    """
    classes = (ModelArguments, DataArguments, LoraArguments, RunArguments, *([own] if own else []))
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser(description, *classes)
    group = parser.add_argument_group("training library (any other field of its config class works too)")
    for name, text in LIBRARY_HELP.items():
        known = f" (default: {defaults[name]})" if name in defaults else ""
        group.add_argument(f"--{name}", help=(text + known).replace("%", "%%"), metavar="VALUE", default=None)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    if "LOCAL_RANK" not in os.environ:
        # One process trains on one GPU; the library would split each batch over all that it sees (DataParallel)
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    words = translate_old_flags(argv, notice=lambda line: print(f"note: {line}", file=sys.stderr))
    ours = build_parser(description, *classes)
    namespace, rest = ours.parse_known_args(words)
    model, data, lora, run, *rest_of_them = split_dataclasses(namespace, *classes)
    run.output_dir = run.output_dir or os.path.join(model.outputs, stage)
    check_combinations(model, data, lora, run)
    ours_alone = rest_of_them[0] if rest_of_them else None
    if model.shift_attn and stage not in ("pt", "sft"):
        raise ValueError("--shift_attn: for pretraining and SFT alone; pairs and drawn answers have full attention")
    if isinstance(ours_alone, PreferenceArguments):
        check_preference(ours_alone)
    if isinstance(ours_alone, PolicyArguments):
        check_policy(ours_alone, lora)
    return StageArguments(stage, model, data, lora, run, ours_alone, rest, argv)


def check_combinations(model: ModelArguments, data: DataArguments, lora: LoraArguments, run: RunArguments) -> None:
    """Refuse what cannot work, before anything is loaded."""
    if model.quantization != "none" and not lora.use_peft:
        raise ValueError(
            f"--quantization {model.quantization}: quantised weights cannot be trained, add --use_peft True"
        )
    if model.pure_bf16 and (lora.use_peft or model.dtype not in ("auto", "bfloat16")):
        raise ValueError("--pure_bf16: for training all weights in bfloat16; not with --use_peft or another --dtype")
    if model.shift_attn and model.attn_implementation:
        raise ValueError("--shift_attn and --attn_implementation: give one of them")
    if isinstance(data.max_length, int) and data.max_length < 8:
        raise ValueError(f"--max_length: found {data.max_length}, expected at least 8 tokens")
    if not 0 <= data.validation_split_fraction < 1:
        raise ValueError(f"--validation_split_fraction: found {data.validation_split_fraction}, expected 0 to below 1")
    if run.eval_tasks_steps and not run.eval_tasks:
        raise ValueError("--eval_tasks_steps: needs --eval_tasks, the benchmarks to ask")
    for name in ("max_train_samples", "max_eval_samples", "num_proc", "eval_task_samples", "eval_tasks_steps"):
        value = getattr(run if name.startswith("eval_task") else data, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: found {value}, expected at least 1")
    if (model.router_aux_loss_coef or 0) < 0:
        raise ValueError(f"--router_aux_loss_coef: found {model.router_aux_loss_coef}, expected 0 or more")
    if lora.lora_rank < 1:
        raise ValueError(f"--lora_rank: found {lora.lora_rank}, expected at least 1")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"--lora_dropout: found {lora.lora_dropout}, expected 0 to below 1")


def check_preference(given: PreferenceArguments) -> None:
    if given.beta is None or given.beta <= 0:
        raise ValueError(f"--beta: found {given.beta}, expected a positive number")
    if not 0 <= given.label_smoothing < 0.5:
        raise ValueError(f"--label_smoothing: found {given.label_smoothing}, expected 0 to below 0.5")
    if given.label_smoothing and given.loss_type not in ("sigmoid", "sigmoid_norm", "robust"):
        raise ValueError(f"--label_smoothing: has no meaning for --loss_type {given.loss_type}")
    if given.sft_weight < 0:
        raise ValueError(f"--sft_weight: found {given.sft_weight}, expected 0 or more")


def parse_rewards(text: str, flag: str = "--reward") -> list[tuple[str, float]]:
    """ "exam=1.0,model:outputs/rm=0.5" as [("exam", 1.0), ("model:outputs/rm", 0.5)]; a weight left out is 1.

    Raises:
        ValueError: an unknown name, a weight that is no number, the same name twice, or nothing at all.
    """
    found: list[tuple[str, float]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, weight = part.rpartition("=") if "=" in part else (part, "", "1")
        if name not in REWARD_RULES and not (name.startswith("model:") and name != "model:"):
            raise ValueError(f"{flag}: found {name!r}, expected {', '.join(REWARD_RULES)} or model:FOLDER")
        try:
            found.append((name, float(weight)))
        except ValueError:
            raise ValueError(f"{flag}: found {part!r}, expected a number behind the =") from None
        if name in (other for other, _ in found[:-1]):
            raise ValueError(f"{flag}: found {name} twice")
    if not found:
        raise ValueError(f"{flag}: found nothing, expected names with weights such as exam=1.0,format=0.2")
    return found


def check_policy(given: PolicyArguments, lora: LoraArguments) -> None:
    for name in ("reward", "held_out_reward"):
        if getattr(given, name) is not None:
            parse_rewards(getattr(given, name), f"--{name}")
    for name in ("num_generations", "num_ppo_epochs", "total_episodes", "target_kl"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name}: found {value}, expected more than 0")
    for name in ("max_new_tokens", "num_mini_batches", "generation_batch_size", "alarm_patience"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name}: found {getattr(given, name)}, expected at least 1")
    for name in ("temperature", "cliprange", "cliprange_value"):
        if not getattr(given, name) > 0:
            raise ValueError(f"--{name}: found {getattr(given, name)}, expected more than 0")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(given, name) <= 1:
            raise ValueError(f"--{name}: found {getattr(given, name)}, expected 0 to 1")
    for name in ("kl_coef", "vf_coef", "entropy_coef", "missing_eos_penalty"):
        if getattr(given, name) < 0:
            raise ValueError(f"--{name}: found {getattr(given, name)}, expected 0 or more")
    if given.algorithm != "ppo" and given.num_generations == 1:
        raise ValueError(f"--num_generations: found 1, expected at least 2 for --algorithm {given.algorithm}")
    if given.algorithm == "grpo" and given.kl_estimator == "k1":
        raise ValueError("--kl_estimator k1: says nothing as a part of GRPO's loss (its gradient is 0 on average)")
    if given.target_kl and not given.kl_coef:
        raise ValueError("--target_kl: adapts --kl_coef, which is 0; expected more than 0 to begin with")
    if given.rollout_server and not lora.use_peft:
        raise ValueError("--rollout_server: weights are handed over as an adapter, add --use_peft True")


def make_folder(folder: str | Path, flag: str = "--output_dir") -> None:
    """Make it; find out before the work, not after it, that nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be written to ({error.strerror or error})") from None


def check_output_file(path: str | Path, flag: str = "--output_file") -> None:
    """`make_folder` for a file that grows, or will be written, in its folder."""
    make_folder(Path(path).parent, flag)
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path}: found a folder, expected a file")
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot be written to ({os.strerror(errno.EACCES)})")


def parse_library_flags(args: StageArguments) -> dict[str, Any]:
    """Values of the library flags that were given, by name; unknown ones are refused with the nearest known name."""
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False)
    parser.error = OneLineParser.error.__get__(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if getattr(action.type, "__name__", "") == "string_to_bool":
            action.nargs, action.const = "?", True  # a bare --bf16 means yes, also where the default is None
    parser._defaults.clear()
    pairs = pairs_of(args.library_flags)
    automatic = {name: "auto" for name, words in pairs if name in AUTOMATIC and words == ["auto"]}
    flags = [word for name, words in pairs if name not in automatic for word in (f"--{name}" if name else "", *words)]
    namespace, unknown = parser.parse_known_args([word for word in flags if word])
    if unknown:
        parts = [args.model, args.data, args.lora, args.run, *([args.own] if args.own else [])]
        known = [f"--{f.name}" for part in [*parts, TrainingArguments] for f in dataclasses.fields(part)]
        raise ValueError(unknown_flag(unknown[0], known))
    for name, value in vars(namespace).items():
        if name in ABOVE_ZERO and not value > 0:
            raise ValueError(f"--{name}: found {value}, expected more than 0")
        if name in NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"--{name}: found {value}, expected 0 or more")
    return vars(namespace) | automatic


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: a user's mistake (ValueError) becomes one line on stderr and exit code 2.

    Of several processes that meet the same mistake the first one tells it: the launcher ends the others while they
    wait. A mistake that only another rank meets is told by that one.
    """
    try:
        main()
    except ValueError as error:
        if os.environ.get("SUWEN_TRACEBACK"):
            raise
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(5)
        line = " ".join(str(error).split())
        print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(0)
