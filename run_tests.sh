#!/usr/bin/env bash
# Lint, types and tests; sets up the environment like the launchers, with requirements-dev.txt on top.
#     bash run_tests.sh            lint, types, all tests but slow ones (15 minutes on two cores)
#     bash run_tests.sh --fast     two minutes: no training, no second process, no set-up
#     bash run_tests.sh --all      everything
#     bash run_tests.sh --reliability   faults injected into real runs, the long form, with a table (7 to 30 minutes)
# Further arguments go to pytest: bash run_tests.sh -k template
set -eu
cd "$(dirname "$0")"
root=.
. "$root/configs/launch.sh"

if wants_help "$@"; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit 0
fi
markers="not slow" fast="not slow and not training and not distributed and not setup and not gpu"
case ${1:-} in
    --fast) markers=$fast && shift ;;
    --all) markers="" && shift ;;
    --reliability) markers="" && shift && set -- tests/reliability "$@" ;;
esac

prepare_environment requirements-dev.txt
# The tests need neither a network nor a GPU
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false GRADIO_ANALYTICS_ENABLED=False
failed=

step() { # NAME COMMAND...: goes on after a failure, so that one run shows everything
    name=$1
    shift
    started=$(date +%s)
    printf '\n== %s\n' "$name"
    if "$@"; then result=passed; else result=FAILED && failed="$failed $name"; fi
    printf '== %s %s in %s s\n' "$name" "$result" "$(($(date +%s) - started))"
}

step lint "$python" -m ruff check .
step format "$python" -m ruff format --check .
step types "$python" -m mypy
step tests "$python" -m pytest -m "$markers" "$@"
if [ $# -eq 0 ] && [ "$markers" != "$fast" ]; then # not where some of the tests were asked for
    case $(check_environment gpus) in 0 | '') ;; *) step "tests on the GPU" "$python" -m pytest -m gpu ;; esac
fi

if [ -n "$failed" ]; then
    printf '\nFAILED:%s\n' "$failed"
    exit 1
fi
printf '\nAll passed.\n'
