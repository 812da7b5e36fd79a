#!/usr/bin/env bash
# ORPO on pairs: SFT on the better answer and preference in one stage, without a reference. Goes on from outputs/sft.
#     DATA=data/preference bash run_orpo.sh --orpo_lambda 0.1
# Any flag of orpo_training.py may follow and wins over the settings here; `bash run_orpo.sh --help` lists flags and variables.
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

DATA=${DATA:-$root/data/preference}
OUTPUT=${OUTPUT:-outputs/orpo}

launch orpo_training.py \
    --do_train \
    --do_eval \
    --num_train_epochs 1 \
    --use_peft True \
    --target_modules all \
    --lora_rank 16 \
    --lora_alpha 32 \
    --lora_dropout 0.05 \
    "$@"
