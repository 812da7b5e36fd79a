#!/usr/bin/env bash
# Direct preference optimisation on pairs: the model learns which answer is better. Goes on from outputs/sft.
#     DATA=data/preference bash run_dpo.sh --beta 0.1
# Any flag of dpo_training.py may follow and wins over the settings here; `bash run_dpo.sh --help` lists flags and variables.
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

DATA=${DATA:-$root/data/preference}
OUTPUT=${OUTPUT:-outputs/dpo}

launch dpo_training.py \
    --do_train \
    --do_eval \
    --num_train_epochs 1 \
    --use_peft True \
    --target_modules all \
    --lora_rank 16 \
    --lora_alpha 32 \
    --lora_dropout 0.05 \
    "$@"
