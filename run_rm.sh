#!/usr/bin/env bash
# Reward modelling on pairs: a model learns to score answers, for PPO and for comparisons. Goes on from outputs/sft.
#     DATA=data/preference bash run_rm.sh
# Any flag of reward_modeling.py may follow and wins over the settings here; `bash run_rm.sh --help` lists flags and variables.
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

DATA=${DATA:-$root/data/preference}
OUTPUT=${OUTPUT:-outputs/rm}

launch reward_modeling.py \
    --do_train \
    --do_eval \
    --num_train_epochs 1 \
    --use_peft True \
    --target_modules all \
    --lora_rank 16 \
    --lora_alpha 32 \
    --lora_dropout 0.05 \
    "$@"
