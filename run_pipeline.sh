#!/usr/bin/env bash
# From nothing to a trained model, and a measurement of what each stage does: sets up the environment, invents a medical
# knowledge graph, and teaches it by pretraining -> SFT -> DPO -> merge. No score can come from what a model knew before.
#     bash run_pipeline.sh                          the tiny embedded model, under ten minutes on two cores
#     bash run_pipeline.sh --seeds 3 --size full    three graphs, and more than twice the training
#     bash run_pipeline.sh --model Qwen/Qwen3-0.6B --output_dir outputs/qwen      a model of your own, by LoRA
# Facts of group A are in pretraining and SFT, those of B in pretraining alone, those of C in neither. After every stage
# the model is asked in wordings that it has never seen. OUTPUT_DIR/seed-1/report.html compares the stages, OUTPUT_DIR/stages.png
# shows them.
# Called again, it goes on where it stopped. The variables of run_sft.sh (NUM_PROCESSES, CONFIG, WHEELHOUSE, ...) work here.
#   --output_dir DIR   (outputs/pipeline)    --seed S    of the first graph (1)        --size default|full
#   --model NAME       (the embedded one)    --seeds N   graphs, one after another (1)
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

if wants_help "$@"; then
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    launch_help
    exit 0
fi
output=outputs/pipeline
model=${MODEL:-}
seed=1
seeds=1
size=default
while [ $# -gt 0 ]; do
    case $1 in
        --*=*) name=${1%%=*} && value=${1#*=} && shift ;;
        --*) name=$1 && value=${2:-} && shift && [ $# -eq 0 ] || shift ;;
        *) name=$1 ;;
    esac
    case $name in
        --output_dir) [ -n "${value:-}" ] || fail "--output_dir: found nothing, expected a folder" ;;
        --model) [ -n "${value:-}" ] || fail "--model: found nothing, expected a model" ;;
        --seed | --seeds) case ${value:-} in '' | *[!0-9]*) fail "$name: found ${value:-nothing}, expected a number" ;; esac ;;
        --size) case ${value:-} in default | full) ;; *) fail "--size: found ${value:-nothing}, expected default or full" ;; esac ;;
        *) fail "unknown argument $name; known: --output_dir, --model, --seed, --seeds, --size, --help" ;;
    esac
    case $name in
        --output_dir) output=$value ;;
        --model) model=$value ;;
        --seed) seed=$value ;;
        --seeds) seeds=$value ;;
        --size) size=$value ;;
    esac
done

# Settings. The tiny model is trained with all its weights before DPO; an own model by LoRA throughout.
data_flags="--recipe fictional --size 75 --answers value --passes 40 --questions 14 --pairs 6 --reading 0 --replay 0.3"
lora="--use_peft True --target_modules all --lora_rank 16 --lora_alpha 32"
tiny="--max_length 2048 --gradient_accumulation_steps 1 --logging_steps 20 --validation_split_fraction 0.02"
pt_flags="--learning_rate 2e-3 $tiny"
sft_flags="--learning_rate 1e-3 $tiny"
dpo_flags="--num_train_epochs 1 --learning_rate 5e-4 --beta 0.1 --sft_weight 0.2 $tiny $lora"
case $size in
    default) pt_flags="--num_train_epochs 5 $pt_flags" && sft_flags="--num_train_epochs 3 $sft_flags" ;;
    full) pt_flags="--num_train_epochs 12 $pt_flags" && sft_flags="--num_train_epochs 6 $sft_flags" ;;
esac
if [ -n "$model" ]; then
    pt_flags="--num_train_epochs 5 --learning_rate 1e-4 $lora"
    sft_flags="--num_train_epochs 2 --learning_rate 1e-4 $lora"
    dpo_flags="--num_train_epochs 1 $lora"
fi

title() { printf '\n=== %s\n' "$*"; }

# python_run FILE ARGUMENT...: one of our own programs, in one process
python_run() {
    program=$root/$1
    shift
    if [ -n "${DRY_RUN:-}" ]; then quoted "$python" "$program" "$@"; else "$python" "$program" "$@"; fi
}

# stage SCRIPT DATA OUTPUT FLAG...
stage() {
    script=$1
    title "$script: $folder/data/$2 -> $folder/$3"
    train=$folder/data/$2
    result=$folder/$3
    shift 3
    run_stage "$script" --do_train --do_eval --train_file_dir "$train" --output_dir "$result" \
        --eval_tasks injection --eval_data_dir "$folder/data/evaluation" "$@"
}

# start_of STAGE: the model that it went on from
start_of() {
    if [ -n "${DRY_RUN:-}" ]; then echo "${model:-START}" && return 0; fi
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1], encoding="utf-8"))["start"])' "$1/run.json"
}

# experiment: all stages on the graph of $seed, in $folder
experiment() {
    title "an invented graph, seed $seed -> $folder/data"
    if [ -f "$folder/data/data_card.json" ]; then
        echo "$folder/data is there already"
    else
        # shellcheck disable=SC2086 # the flags are words on purpose
        python_run tools/build_data.py $data_flags --seed "$seed" --output_dir "$folder/data"
    fi
    # shellcheck disable=SC2086
    {
        stage pretraining.py pretrain pt $pt_flags ${model:+--model_name_or_path "$model"}
        stage supervised_finetuning.py sft sft --model_name_or_path "$folder/pt" $sft_flags
        stage dpo_training.py preference dpo --model_name_or_path "$folder/sft" $dpo_flags
    }
    title "merge: $folder/dpo -> $folder/merged"
    if [ -f "$folder/merged/config.json" ] && [ "$folder/merged/config.json" -nt "$folder/dpo/run.json" ]; then
        echo "$folder/merged is there already and newer than $folder/dpo"
    else
        if [ -z "${DRY_RUN:-}" ] && [ -f "$folder/merged/config.json" ]; then rm -rf "$folder/merged"; fi # of an earlier run
        python_run merge_peft_adapter.py --lora_model "$folder/dpo" --output_dir "$folder/merged"
    fi
    title "the start, asked the same"
    start=$(start_of "$folder/pt")
    python_run evaluation.py --base_model "$start" --tasks injection --data_dir "$folder/data/evaluation" \
        --output_dir "$folder/start"
}

prepare_environment "$root/requirements.txt"
started=$(date +%s)
last=$((seed + seeds - 1))
run_seeds=
while [ "$seed" -le "$last" ]; do
    folder=$output/seed-$seed
    experiment
    run_seeds="$run_seeds $seed"
    seed=$((seed + 1))
done

title "what each stage changed"
# shellcheck disable=SC2086
python_run tools/experiment_table.py --seeds $run_seeds --output_dir "$output"

printf '\nDone in %s s. Talk to it: %s %s --base_model %s --interactive\n' \
    "$(($(date +%s) - started))" "$python" "$root/inference.py" "$folder/merged"
