"""The names that older launchers hold (MedicalGPT's, transformers 4's): what each is called today, or why it went.

Standard library only, as the command line itself.
"""

from __future__ import annotations

from collections.abc import Callable

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
    return not values or values[0].lower() in {"true", "t", "yes", "y", "1"}  # the library's words


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
