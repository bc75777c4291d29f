#!/usr/bin/env bash
# Tests this machine's GPU with what lies beside this script, and ends with one table (docs/gpu-testing.md).
# Needs an NVIDIA driver, bash and coreutils.
#
#   run.sh [--only SUITE]... [--sanitizer] [--17b DIR] [--logs DIR]
#
#   --only SUITE   this suite alone; may be given several times. `run.sh --list` names them
#   --sanitizer    also a part of the conformance suite under compute-sanitizer (on PATH, in COMPUTE_SANITIZER, or in
#                  /usr/local/cuda/bin)
#   --17b DIR      also the full model, written to DIR where it is not there yet (35.3 GB): its goldens with given
#                  tokens in f32 and bf16, how long it loads, `bench` in bf16
#   --logs DIR     where the output of every suite goes [default: logs, beside this script]
#   COGVLM_TEST_THREADS   tests at a time [default: 4]
#   COGVLM_TEST_PATIENCE  factor on the time that every suite may take [default: 1]
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd) || exit 1
logs=$here/logs
only=()
full_model=
with_sanitizer=
list_only=
while (($#)); do
    case $1 in
    --only) only+=("$2") && shift ;;
    --sanitizer) with_sanitizer=yes ;;
    --17b) full_model=$(realpath -m "$2") && shift ;;
    --logs) logs=$(realpath -m "$2") && shift ;;
    --list) list_only=yes ;;
    *) sed -n 's/^# \{0,1\}//; 2,14p' "$0" && exit 2 ;;
    esac
    shift
done
threads=${COGVLM_TEST_THREADS:-4}
patience=${COGVLM_TEST_PATIENCE:-1}
program=$here/cogvlm-shard
tokenizer=$here/data/tests/goldens/tokenizer.model
export COGVLM_TEST_ROOT=$here/data COGVLM_TEST_PROGRAM=$program COGVLM_TEST_17B=$full_model
mkdir -p "$logs" && cd "$here" || exit 1

rows=()
any_failed=

# is_wanted SUITE: whether it is to be run now.
is_wanted() {
    if [[ $list_only ]]; then
        echo "$1"
        return 1
    fi
    ((${#only[@]} == 0)) || [[ " ${only[*]} " == *" $1 "* ]]
}

# record SUITE PASSED FAILED SECONDS
record() {
    rows+=("$(printf '%-34s %7s %7s %8s' "$@")")
    (($3 == 0)) || any_failed=yes
}

# limited SECONDS COMMAND...: ends it when its time is over; gives 124 or 137 then.
limited() {
    local limit=$(($1 * patience))
    shift
    timeout --kill-after=10 "$limit" "$@"
}

# run_command SUITE SECONDS COMMAND...: a suite that is one command, whose output is shown.
run_command() {
    local suite=$1 limit=$2 start=$SECONDS
    shift 2
    is_wanted "$suite" || return 0
    echo "== $suite: ${*##*/}"
    limited "$limit" "$@" 2>&1 | tee "$logs/$suite.log"
    local ended=${PIPESTATUS[0]}
    ((ended == 0)) || echo "$suite: exit code $ended$(is_timeout "$ended")"
    record "$suite" $((ended == 0)) $((ended != 0)) $((SECONDS - start))
}

is_timeout() {
    if (($1 == 124 || $1 == 137)); then echo ' (out of time)'; fi
}

# run_tests SUITE SECONDS THREADS EXECUTABLE ARGUMENTS...: the ignored tests of an executable that the arguments leave.
# Tests share one context of the GPU, which no test survives after one has broken it, so each that did not pass is run
# again alone. `under` stands before the executable.
under=()
run_tests() {
    local suite=$1 limit=$2 threads=$3 executable=$4 start=$SECONDS
    shift 4
    is_wanted "$suite" || return 0
    local log=$logs/$suite.log names name ended passed=0 failed=()
    names=$("$executable" --ignored --list --format terse "$@" 2>/dev/null | sed -n 's/: test$//p')
    echo "== $suite: $(wc -w <<<"$names") tests"
    limited "$limit" "${under[@]}" "$executable" --ignored --test-threads="$threads" "$@" >"$log" 2>&1
    ended=$?
    for name in $names; do
        if grep -qE "^test $name( - should panic)? \.\.\. .*ok$" "$log"; then
            passed=$((passed + 1))
        else
            failed+=("$name")
        fi
    done
    if ((ended != 0)); then
        echo "$suite: exit code $ended$(is_timeout "$ended"), see $log"
        # A crash after the last test, or what a sanitizer reports.
        ((${#failed[@]})) || failed=("-")
    fi
    if ((${#failed[@]} == 0 && passed == 0)); then
        echo "$suite: no test has this name"
        failed=("-")
    fi
    local again=$SECONDS
    for name in "${failed[@]}"; do
        [[ $name != - && ${#under[@]} == 0 ]] || continue
        if ((SECONDS - again > 60)); then
            echo "  and more that are not run again"
            break
        fi
        limited 20 "$executable" --ignored --exact --test-threads=1 "$name" >"$logs/alone.log" 2>&1
        case $? in
        0) echo "  $name: passes alone" ;;
        124 | 137) echo "  $name: takes more than 20 s alone" ;;
        *)
            echo "  $name: fails alone"
            grep -v '^$\|^running\|^test \|^note:\|^failures:\|^---- \|^    ' "$logs/alone.log" | head -6 | sed 's/^/    /'
            ;;
        esac
        cat "$logs/alone.log" >>"$log"
    done
    rm -f "$logs/alone.log"
    record "$suite" "$passed" "${#failed[@]}" $((SECONDS - start))
}

if [[ ! $list_only ]]; then
    echo "cogvlm-shard $(cat version.txt)"
    nvidia-smi --query-gpu=index,name,driver_version,memory.total,memory.used --format=csv,noheader 2>/dev/null
fi

run_command doctor 180 "$program" doctor --backend cuda
for executable in tests/*; do
    name=${executable##*/}
    case $name in
    cogvlm-cli-goldens)
        run_tests goldens-f32 300 "$threads" "$executable" gpu_f32
        run_tests goldens-bf16 300 "$threads" "$executable" gpu_bf16
        ;;
    cogvlm-cuda-load)
        run_tests "$name" 240 2 "$executable" --skip rates
        run_command load-rates 120 "$executable" --ignored --nocapture rates
        ;;
    cogvlm-cli-processes)
        run_tests "$name" 300 1 "$executable" --skip two_gpus
        if (($(nvidia-smi -L 2>/dev/null | wc -l) > 1)); then
            run_tests two-gpus 400 1 "$executable" two_gpus
        fi
        ;;
    *) run_tests "$name" 300 "$threads" "$executable" ;;
    esac
done

if [[ $with_sanitizer ]]; then
    sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
    if [[ -x $sanitizer ]]; then
        # What computes addresses in unusual ways, and what shares memory between threads, on every path.
        accesses=(f32::rms_norm f32::patch_embed f32::attention f32::linear bf16_portable::linear
            bf16_portable::attention bf16_portable::image_attention bf16_hopper::linear bf16_hopper::gate_up
            bf16_hopper::qkv_rope_append bf16_hopper::layer_norm bf16_hopper::sample bf16_hopper::copy_rows)
        races=(f32::rms_norm bf16_generic::linear bf16_portable::linear bf16_portable::gate_up
            bf16_portable::attention bf16_portable::image_attention bf16_portable::layer_norm bf16_portable::sample)
        under=("$sanitizer" --tool memcheck --error-exitcode 9)
        run_tests memcheck 600 1 tests/cogvlm-cuda-conformance "${accesses[@]}"
        under=("$sanitizer" --tool racecheck --error-exitcode 9)
        run_tests racecheck 600 1 tests/cogvlm-cuda-conformance "${races[@]}"
        under=()
    else
        run_command sanitizer 1 ls "$sanitizer"
    fi
fi

if [[ $full_model ]]; then
    if [[ ! -e $full_model/config.json ]]; then
        run_command 17b-synth 900 "$program" synth cogvlm-chat-17b@1 --out "$full_model"
    fi
    load=("$program" generate --backend cuda --model "$full_model" --tokenizer "$tokenizer" --prompt "Hello"
        --max-new-tokens 8 --ignore-eos --json)
    run_command 17b-load-first 600 "${load[@]}"
    run_command 17b-load-again 600 "${load[@]}"
    run_tests goldens-17b 1800 1 tests/cogvlm-cli-goldens full_size
    run_command 17b-bench 900 "$program" bench --backend cuda --model "$full_model" --batch 16 \
        --sequences 1,2,4,8,16
fi
run_command kernels 120 "$program" bench --kernels --model cogvlm-chat-17b --backend cuda
run_command kernels-portable 120 "$program" bench --kernels --model cogvlm-chat-17b --backend cuda --path portable

if [[ ! $list_only ]]; then
    echo
    printf '%-34s %7s %7s %8s\n' suite passed failed seconds
    ((${#rows[@]} == 0)) || printf '%s\n' "${rows[@]}"
fi
[[ ! $any_failed ]]
