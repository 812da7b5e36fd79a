"""Command line of the stage scripts: our flags, and the library's flags.

Standard library only, so that `--help` and mistakes in our own flags are answered before torch loads.
The training library's own flags (learning rate, batch size, ...) are handed to its config class afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from suwen.check_environment import see_one_gpu
from suwen.command_line import OneLineParser, build_parser, flag, split_dataclasses, unknown_flag
from suwen.old_flags import is_true, pairs_of, translate_old_flags


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


# What the library divides by, or multiplies with, without a look at it
ABOVE_ZERO = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "logging_steps", "eval_steps", "save_steps", "ddp_timeout",
)  # fmt: skip
NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers")


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
        see_one_gpu()
    words = translate_old_flags(argv, notice=lambda line: print(f"note: {line}", file=sys.stderr))
    if is_true(dict(pairs_of(words)).get("use_cpu", ["False"])):  # given twice, the later one counts
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # whatever asks for a GPU, bitsandbytes among them, finds none
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
