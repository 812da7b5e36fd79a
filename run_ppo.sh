#!/usr/bin/env bash
# Reinforcement learning (PPO, RLOO, GRPO): the model learns from scores of its own answers. Goes on from outputs/sft.
#     DATA=data/sft bash run_ppo.sh --reward model:outputs/rm=1.0
#     DATA=exam.csv bash run_ppo.sh --algorithm grpo --reward exam=1.0,format=0.2
# Any flag of ppo_training.py may follow and wins over the settings here; `bash run_ppo.sh --help` lists flags and variables.
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

DATA=${DATA:-$root/data/preference}
OUTPUT=${OUTPUT:-outputs/ppo}

launch ppo_training.py \
    --do_train \
    --do_eval \
    --num_train_epochs 1 \
    --use_peft True \
    --target_modules all \
    --lora_rank 16 \
    --lora_alpha 32 \
    --lora_dropout 0.05 \
    "$@"
