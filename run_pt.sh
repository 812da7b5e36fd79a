#!/usr/bin/env bash
# Continued pretraining on plain text: the model learns the field.
#     MODEL=Qwen/Qwen3-8B DATA=data/pretrain bash run_pt.sh --num_train_epochs 2
# Any flag of pretraining.py may follow and wins over the settings here; `bash run_pt.sh --help` lists flags and variables.
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

DATA=${DATA:-$root/data/pretrain}
OUTPUT=${OUTPUT:-outputs/pt}

launch pretraining.py \
    --do_train \
    --do_eval \
    --num_train_epochs 1 \
    --use_peft True \
    --target_modules all \
    --lora_rank 16 \
    --lora_alpha 32 \
    --lora_dropout 0.05 \
    "$@"
