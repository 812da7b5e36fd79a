#!/usr/bin/env bash
# From nothing to a trained model, and a measurement of what each stage does: sets up the environment, invents a medical
# knowledge graph, and teaches it by pretraining -> SFT -> DPO -> merge. No score can come from what a model knew before.
#     bash run_pipeline.sh                          the tiny embedded model, under ten minutes on two cores
#     bash run_pipeline.sh --seeds 3 --size full --output_dir outputs/full    three graphs, more training, and retrieval
#     bash run_pipeline.sh --model Qwen/Qwen3-0.6B --output_dir outputs/qwen      a model of your own, by LoRA
#     bash run_pipeline.sh --stages pt,sft,orpo --output_dir outputs/orpo-pipeline        other stages
# Called again, it goes on where it stopped; other settings want a folder of their own (outputs/pipeline). The variables of run_sft.sh (NUM_PROCESSES, CONFIG, WHEELHOUSE, ...) work here.
set -eu
root=$(dirname "$0")
. "$root/configs/launch.sh"

if wants_help "$@"; then
    find_python
    "$python" "$root/tools/experiment.py" --help
    launch_help
    exit 0
fi
prepare_environment "$root/requirements.txt"
PYTHON=$python SETUP=skip exec "$python" "$root/tools/experiment.py" "$@"
