#!/usr/bin/env bash
# Supervised fine-tuning on conversations: the model learns to answer. Goes on from outputs/pt if that is there.
#     DATA=data/sft bash run_sft.sh --num_train_epochs 3
# Any flag of supervised_finetuning.py may follow and wins over the settings here; `bash run_sft.sh --help` lists flags and variables.
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

DATA=${DATA:-$root/data/sft}
OUTPUT=${OUTPUT:-outputs/sft}

launch supervised_finetuning.py \
    --do_train \
    --do_eval \
    --num_train_epochs 3 \
    --use_peft True \
    --target_modules all \
    --lora_rank 16 \
    --lora_alpha 32 \
    --lora_dropout 0.05 \
    "$@"
