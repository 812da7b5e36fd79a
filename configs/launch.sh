# shellcheck shell=sh
# What the launchers share: find or make the environment, look at the GPUs, start the stage. Sourced, never run; POSIX sh.
#
# A launcher sets root (the folder of the scripts), DATA and OUTPUT, sources this file and calls
# `launch SCRIPT [default flags] "$@"`. Of a flag given twice the later one wins, so the user's stand at the end.

launch_help() {
    cat <<'EOF'
Variables (all optional):
  MODEL            model folder or hub name; default: the newest output of the stage before, else a tiny embedded model
  DATA             training files or folders, a comma list, each with :weight if wanted
  VALIDATION_DATA  the same for validation; default: a seeded part of the training data
  OUTPUT           output folder
  CONFIG           how several processes share the work: ddp (default), zero1, zero2, zero3, each zero also with _offload,
                   fsdp2, or the path of an accelerate configuration
  NUM_PROCESSES    processes on this machine; default: one for each visible GPU, one without GPUs
  CUDA_VISIBLE_DEVICES   which GPUs; empty for none
  NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT   several machines: the same command on each, with its rank
  HOSTFILE         instead of these: DeepSpeed's list of machines, a line "name slots=GPUs" each, the first is machine 0
  PREFLIGHT_WAIT   seconds that a machine waits for the others to start; default: 300
  PREFLIGHT_SKIP   a reason to start several processes without comparing code, packages, data and links first
  PYTHON           interpreter to use instead of the active one; 3.11 or newer
  SETUP=skip       use that interpreter as it is: no check of its packages, nothing installed
  WHEELHOUSE       folder of wheels to install from, without a network (fill it by: pip wheel -r requirements.txt -w DIR)
  TORCH_INDEX_URL  package index for torch alone, for another build: https://download.pytorch.org/whl/cu126, .../cpu
  PIP_INDEX_URL, HF_ENDPOINT, HF_HUB_OFFLINE   pip's and the model hub's own settings, respected
  DRY_RUN=1        print the command instead of running it
EOF
}

say() { printf '%s\n' "$*" >&2; }

counted() { # NUMBER ONE MANY
    case $1 in 1) printf '%s %s' "$1" "$2" ;; *) printf '%s %s' "$1" "$3" ;; esac
}

fail() {
    say "error: $*"
    exit 2
}

wants_help() {
    for argument in "$@"; do
        case $argument in -h | --help) return 0 ;; esac
    done
    return 1
}

# --- The interpreter

runs_python() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; }

# Sets python to the interpreter the user meant: PYTHON, the active environment, or the first one on PATH that is 3.11 or
# newer (transformers 5.23 and TRL 1.16 do not install on 3.10).
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        runs_python "$PYTHON" || fail "PYTHON=$PYTHON does not run or is older than 3.11"
        python=$PYTHON
        return
    fi
    for python in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
        python3 python python3.13 python3.12 python3.11; do
        if [ -n "$python" ] && runs_python "$python"; then return; fi
    done
    fail "found no Python 3.11 or newer on PATH; install one (conda create -n suwen python=3.12, or apt install" \
        "python3.12-venv) or set PYTHON=/path/to/python3"
}

check_environment() { PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m suwen.check_environment "$@"; }

# --- The environment

# Two launchers (or two machines that share the disk) must not fill .venv at once. A lock whose owner died is removed.
lock_environment() {
    lock=$root/.venv.lock
    waited=0
    until mkdir "$lock" 2>/dev/null; do
        [ -d "$lock" ] || fail "cannot write to $root; set PYTHON to an environment that holds requirements.txt"
        owner=$(cat "$lock/owner" 2>/dev/null || true)
        case $owner in
            "$(uname -n) "*) kill -0 "${owner##* }" 2>/dev/null || { rm -rf "$lock"; continue; } ;;
        esac
        [ "$waited" -gt 0 ] || say "Waiting for another launcher to finish .venv (${owner:-unknown}); if there is none: rm -r $lock"
        waited=$((waited + 1))
        [ "$waited" -le 3600 ] || fail "gave up waiting for $lock"
        sleep 1
    done
    echo "$(uname -n) $$" >"$lock/owner"
    trap 'rm -rf "$lock"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

unlock_environment() {
    trap - EXIT INT TERM
    rm -rf "$lock"
}

# Sets pip to a command that installs into .venv, also where Python came without ensurepip (Debian without python3-venv).
make_environment() {
    venv_python=$root/.venv/bin/python
    base_pip=
    if ! runs_python "$venv_python" 10; then
        say "Making .venv with $("$python" --version) ..."
        if ! "$python" -m venv --clear "$root/.venv" >/dev/null 2>&1; then
            "$python" -m venv --clear --without-pip "$root/.venv" || fail "$python cannot make a virtual environment"
        fi
    fi
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        base_pip=$("$python" -c 'import pip; print(pip.__path__[0])' 2>/dev/null) ||
            fail "$python has no pip; install it (on Debian and Ubuntu: apt install python3-pip python3-venv)"
    fi
}

install() {
    if [ -n "$base_pip" ]; then
        set -- "$venv_python" "$base_pip" install "$@"
    else
        set -- "$venv_python" -m pip install "$@"
    fi
    if [ -n "${WHEELHOUSE:-}" ]; then set -- "$@" --no-index --find-links "$WHEELHOUSE"; fi
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$@" >&2 || fail "the installation failed (above); run the same command again to go on"
}

# True where .venv was filled to the end for this requirements file, and still holds it. Sets python to its interpreter.
venv_is_ready() {
    python=$root/.venv/bin/python
    stamp=$root/.venv/${1##*/}.sha256
    [ -x "$python" ] && check_environment packages "$1" --stamp "$stamp"
}

# prepare_environment FILE: sets python to an interpreter whose environment holds these requirements, making .venv if
# none does. Seconds when it is there.
prepare_environment() {
    find_python
    [ "${SETUP:-auto}" != skip ] || return 0
    missing=$(check_environment packages "$1" 2>&1) && return 0
    base_python=$python
    if venv_is_ready "$1"; then return 0; fi
    if [ -n "${DRY_RUN:-}" ]; then
        say "$base_python: $missing; would fill .venv"
        python=$base_python
        return 0
    fi
    if [ -x "$python" ]; then say ".venv is unfinished or older than ${1##*/}"; else say "$base_python: $missing"; fi
    python=$base_python
    if [ -n "${WHEELHOUSE:-}" ]; then
        [ -d "$WHEELHOUSE" ] || fail "WHEELHOUSE=$WHEELHOUSE is not a folder"
    elif [ -z "${TORCH_INDEX_URL:-}" ]; then
        check_environment build || exit 2
    fi
    lock_environment
    if ! venv_is_ready "$1"; then
        python=$base_python
        make_environment
        say "Installing into .venv; the first time takes minutes (torch is large) ..."
        if [ -n "${TORCH_INDEX_URL:-}" ]; then
            install --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' "$root/requirements.txt")"
        fi
        install -r "$1"
        python=$venv_python
        check_environment packages "$1" || fail ".venv does not hold what it should after the installation (above)"
        check_environment fingerprint "$1" >"$stamp"
        say "The environment is ready: .venv"
    fi
    unlock_environment
}

# --- The launch

# Sets num_gpus (0 where torch cannot use any) and num_processes (on this machine).
count_processes() {
    num_gpus=$(check_environment gpus) || exit 2
    num_processes=${NUM_PROCESSES:-$num_gpus}
    case $num_processes in *[!0-9]*) fail "NUM_PROCESSES: found $num_processes, expected a number" ;; esac
    [ "$num_processes" -ge 1 ] || num_processes=1
    if [ "$num_gpus" -gt 0 ] && [ "$num_processes" -gt "$num_gpus" ]; then
        fail "NUM_PROCESSES=$num_processes, but $(counted "$num_gpus" 'GPU is' 'GPUs are') visible"
    fi
}

# Several processes on the CPU would each take all cores and fight; on GPUs a few threads feed them.
share_cores() {
    threads=$(($(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1) / num_processes))
    [ "$threads" -ge 1 ] || threads=1
    if [ "$num_gpus" -gt 0 ] && [ "$threads" -gt 8 ]; then threads=8; fi
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
    export OMP_NUM_THREADS
}

find_config() {
    config=${CONFIG:-ddp}
    [ -f "$config" ] || config=$root/configs/$config.yaml
    [ -f "$config" ] || fail "CONFIG: found $CONFIG, expected a file or one of:$(cd "$root/configs" && printf ' %s' ./*.yaml | sed 's#\./##g; s#\.yaml##g')"
}

# Sets what several machines need from a list of them; this one is found by its name or one of its addresses.
read_hostfile() {
    [ -f "$HOSTFILE" ] || fail "HOSTFILE: $HOSTFILE not found, expected a file with a line \"name slots=GPUs\" for each machine"
    own=" $(uname -n) $(hostname -f 2>/dev/null || true) $(hostname -I 2>/dev/null || true) "
    NUM_MACHINES=0
    while read -r name slots rest || [ -n "$name" ]; do
        case $name in '' | '#'*) continue ;; esac
        count=${slots#slots=}
        case $slots in slots=[1-9] | slots=[1-9][0-9]) ;; *) fail "HOSTFILE: found \"$name $slots $rest\", expected \"name slots=GPUs\"" ;; esac
        [ "$NUM_MACHINES" -gt 0 ] || MAIN_PROCESS_IP=${MAIN_PROCESS_IP:-$name} NUM_PROCESSES=$count
        [ "$count" = "$NUM_PROCESSES" ] || fail "HOSTFILE: found $count slots for $name, expected $NUM_PROCESSES as for the first"
        case $own in *" $name "* | *" $name."*) MACHINE_RANK=${MACHINE_RANK:-$NUM_MACHINES} ;; esac
        NUM_MACHINES=$((NUM_MACHINES + 1))
    done <"$HOSTFILE"
    [ "$NUM_MACHINES" -gt 0 ] || fail "HOSTFILE: $HOSTFILE names no machine"
    [ -n "${MACHINE_RANK:-}" ] || fail "HOSTFILE: this machine ($(uname -n)) is not in $HOSTFILE; add it, or set MACHINE_RANK"
}

quoted() {
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,+@%-]*) printf "'%s' " "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
            *) printf '%s ' "$word" ;;
        esac
    done
    echo
}

# run_stage SCRIPT FLAG...: plain Python for one process, accelerate for more. Takes the shell's place if run is "exec".
run_stage() {
    [ -z "${HOSTFILE:-}" ] || read_hostfile
    count_processes
    script=$root/$1
    shift
    machines=${NUM_MACHINES:-1}
    find_config
    if [ "$machines" -gt 1 ]; then
        [ -n "${MAIN_PROCESS_IP:-}" ] || fail "NUM_MACHINES=$machines needs MAIN_PROCESS_IP, the address of the machine of rank 0"
        [ -n "${MACHINE_RANK:-}" ] || fail "NUM_MACHINES=$machines needs MACHINE_RANK, 0 to $((machines - 1)), another one on each machine"
        [ "$MACHINE_RANK" -lt "$machines" ] || fail "MACHINE_RANK: found $MACHINE_RANK, expected 0 to $((machines - 1))"
    fi
    # One process needs no engine, unless it was asked for (ZeRO with offload on one GPU)
    if [ "$machines" -eq 1 ] && [ "$num_processes" -eq 1 ] && [ "${CONFIG:-ddp}" = ddp ]; then
        set -- "$python" "$script" "$@"
    else
        share_cores
        port=0 # any free one
        [ "$machines" -eq 1 ] || port=29500
        engine=$(sed -n 's/^distributed_type: *//p' "$config")
        if [ "$num_gpus" -eq 0 ]; then
            case $engine in
                FSDP) fail "CONFIG=$CONFIG needs GPUs: accelerate (state.py) would quietly put DDP in its place; on the CPU: ddp, zero1, zero2 or zero3" ;;
                # accelerate would quietly put DDP in DeepSpeed's place if it were told to use the CPU
                DEEPSPEED) export DS_ACCELERATOR=cpu && set -- --ddp_backend gloo "$@" ;;
                *) export ACCELERATE_USE_CPU=true ;;
            esac
        fi
        set -- "$script" "$@"
        # DeepSpeed's own file by its full path: the launcher may be called from any folder
        if [ -f "${config%.yaml}.json" ]; then set -- --deepspeed_config_file "${config%.yaml}.json" "$@"; fi
        set -- --config_file "$config" --num_processes "$((num_processes * machines))" --num_machines "$machines" \
            --machine_rank "${MACHINE_RANK:-0}" --main_process_ip "${MAIN_PROCESS_IP:-127.0.0.1}" \
            --main_process_port "${MAIN_PROCESS_PORT:-$port}" "$@"
        set -- "$python" "$root/configs/launch.py" "$@"
    fi
    processes=$(counted "$num_processes" process processes)
    case $num_gpus in
        0) say "No GPU in use: $processes on the CPU" ;;
        *) say "$(counted "$num_gpus" GPU GPUs), $processes" ;;
    esac
    if [ -n "${DRY_RUN:-}" ]; then
        quoted "$@"
        return 0
    fi
    ${run:-} "$@"
}

# launch SCRIPT [default flag...] [user's flag...]: a stage with the data, model and output folder of the variables.
launch() {
    if wants_help "$@"; then
        printf 'Usage: [VARIABLE=value ...] bash %s [--flag value ...]\n\n' "${0##*/}"
        launch_help
        printf '\nDefaults here: DATA=%s OUTPUT=%s\n\nFlags, passed on to %s:\n\n' "$DATA" "$OUTPUT" "$1"
        find_python
        exec "$python" "$root/$1" --help
    fi
    prepare_environment "$root/requirements.txt"
    stage=$1
    shift
    case " $*" in *" --train_file"*) ;; *) set -- --train_file_dir "$DATA" "$@" ;; esac
    [ -z "${VALIDATION_DATA:-}" ] || set -- --validation_file_dir "$VALIDATION_DATA" "$@"
    [ -z "${MODEL:-}" ] || set -- --model_name_or_path "$MODEL" "$@"
    run=exec
    run_stage "$stage" --output_dir "$OUTPUT" "$@"
}
