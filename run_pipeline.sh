#!/usr/bin/env bash
# From nothing to a trained model: sets up the environment, then pretraining -> SFT -> DPO -> merge -> evaluation -> chat,
# on data/ with the tiny embedded model; under ten minutes on two cores.
#     bash run_pipeline.sh [--output_dir outputs/pipeline]
#     MODEL=Qwen/Qwen3-0.6B bash run_pipeline.sh --output_dir outputs/qwen      the same with a model of your own
# Called again, it goes on where it stopped. The variables of run_sft.sh (NUM_PROCESSES, CONFIG, WHEELHOUSE, ...) work here.
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

# Settings. The tiny model is trained with all its weights before DPO; an own model by LoRA throughout.
output=outputs/pipeline
lora="--use_peft True --target_modules all --lora_rank 16 --lora_alpha 32"
tiny="--max_length 256 --gradient_accumulation_steps 4 --logging_steps 20 --validation_split_fraction 0.15"
pt_flags="--num_train_epochs 8 --learning_rate 2e-3 $tiny"
sft_flags="--num_train_epochs 5 --learning_rate 2e-3 $tiny"
dpo_flags="--num_train_epochs 2 --learning_rate 3e-4 --beta 0.3 $tiny $lora"
if [ -n "${MODEL:-}" ]; then
    pt_flags="--num_train_epochs 1 $lora"
    sft_flags="--num_train_epochs 1 $lora"
    dpo_flags="--num_train_epochs 1 $lora"
fi

if wants_help "$@"; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    launch_help
    exit 0
fi
while [ $# -gt 0 ]; do
    case $1 in
        --output_dir) [ $# -ge 2 ] || fail "--output_dir: found nothing, expected a folder"; output=$2 && shift 2 ;;
        --output_dir=*) output=${1#*=} && shift ;;
        *) fail "unknown argument $1; known: --output_dir DIR, --help" ;;
    esac
done

title() { printf '\n=== %s\n' "$*"; }

# stage SCRIPT DATA OUTPUT FLAG...
stage() {
    script=$1
    title "$script: data/$2 -> $output/$3"
    train=$root/data/$2
    folder=$output/$3
    shift 3
    run_stage "$script" --do_train --do_eval --train_file_dir "$train" --output_dir "$folder" "$@"
}

# python_run FILE ARGUMENT...: one of our own programs, in one process
python_run() {
    program=$root/$1
    shift
    if [ -n "${DRY_RUN:-}" ]; then quoted "$python" "$program" "$@"; else "$python" "$program" "$@"; fi
}

prepare_environment "$root/requirements.txt"
started=$(date +%s)

# shellcheck disable=SC2086 # the flags are words on purpose
{
    stage pretraining.py pretrain pt $pt_flags ${MODEL:+--model_name_or_path "$MODEL"}
    stage supervised_finetuning.py sft sft --model_name_or_path "$output/pt" $sft_flags
    stage dpo_training.py preference dpo --model_name_or_path "$output/sft" $dpo_flags
}

title "merge: $output/dpo -> $output/merged"
if [ -f "$output/merged/config.json" ] && [ "$output/merged/config.json" -nt "$output/dpo/run.json" ]; then
    echo "$output/merged is there already and newer than $output/dpo"
else
    if [ -z "${DRY_RUN:-}" ] && [ -f "$output/merged/config.json" ]; then rm -rf "$output/merged"; fi # of an earlier run
    python_run merge_peft_adapter.py --lora_model "$output/dpo" --output_dir "$output/merged"
fi

title "what each stage changed"
python_run tools/stage_table.py --stages "$output/pt" "$output/sft" "$output/dpo"

title "a sample chat with $output/merged"
python_run inference.py --base_model "$output/merged" --max_new_tokens 128

printf '\nDone in %s s. Talk to it: %s %s --base_model %s --interactive\n' \
    "$(($(date +%s) - started))" "$python" "$root/inference.py" "$output/merged"
