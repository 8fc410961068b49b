#!/usr/bin/env bash
# All GPU tests, all op benchmarks, the training throughput on MovieLens-1M, a step in the shape of MovieLens-20M and
# searches with wide beams, in under nine minutes on one GPU.
#
#     bash benchmarks/gpu_suite.sh
#
# Needs torch, triton, numpy, pandas, pyarrow, tensorboard and gin-config; for the tests pytest and hypothesis, for the
# training also safetensors. Every
# part has a time limit and the script always reaches its end; its last lines say what failed or was left out, and it
# exits with 1 where anything was. Rows go to benchmarks/results/*.csv.
#
#   OUT=DIR               also put gpu_suite.log and results.tar.gz (the csv files) there; default benchmarks/results
#   DATA_DIR=DIR          prepared datasets; default tmp. Without ml-1m there it is prepared from ML_1M_ZIP=FILE, and
#                         without that a synthetic dataset takes its place
#   GPU_SUITE_TRAIN=1     afterwards the published training of HSTU-large, which the nine minutes do not include
#   GPU_SUITE_OPS="A B"   these ops only
#   GR_COMMIT=NAME        the commit that the rows name, where the code is no checkout
#   GPU_SUITE_DEVICE=cpu  try the script where there is no GPU: smallest shapes, once, nothing kept but in OUT
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

DEVICE=${GPU_SUITE_DEVICE:-cuda}
DATA_DIR=${DATA_DIR:-tmp}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
RESULTS=benchmarks/results
EFFORT=()
STEPS=48
USERS=6040
if [ "$DEVICE" = cpu ]; then
    OUT=${OUT:-$(mktemp -d)}
    RESULTS=$OUT/csv
    EFFORT=(--quick)
    STEPS=4
    USERS=1000
    export CUDA_VISIBLE_DEVICES=
fi
OUT=${OUT:-$RESULTS}
# Seconds since the start at which the tests, the op benchmarks and the rest must have ended.
TESTS_END=170
OPS_END=420
END=525
TRAIN_LIMIT=1500
WRONG=()
export PYTHONUNBUFFERED=1

# part NAME LIMIT END COMMAND...: runs the command for at most LIMIT seconds and not beyond second END.
part() {
    local name=$1 limit=$2 left=$(($3 - SECONDS)) status
    shift 3
    ((left < limit)) && limit=$left
    if ((limit < 5)); then
        echo "== $name: left out, its time is used up"
        WRONG+=("$name: left out")
        return 1
    fi
    echo "== $name (second $SECONDS, limit $limit)"
    timeout --kill-after=10 "$limit" "$@"
    status=$?
    case $status in
        0) ;;
        124 | 137) WRONG+=("$name: stopped after $limit s") ;;
        *) WRONG+=("$name: status $status") ;;
    esac
    return $status
}

has() {
    "$PYTHON" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"
}

environment() {
    echo "== environment: $(date -u +%FT%TZ), commit $(git describe --always --dirty --exclude='*' 2>/dev/null || echo "${GR_COMMIT:-unknown}")"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    local module
    for module in torch triton numpy pandas pyarrow tensorboard gin; do
        has "$module" || WRONG+=("$module is not installed: what needs it fails")
    done
    [ "${GPU_SUITE_TRAIN:-}" != 1 ] || has safetensors || WRONG+=("safetensors is not installed: no training")
    has pytest || WRONG+=("pytest is not installed: nothing is tested, and the rows say so")
    has hypothesis || WRONG+=("hypothesis is not installed: tests that use it are red, and their ops are not timed")
    "$PYTHON" - <<'PYTHON'
import platform
from importlib.metadata import PackageNotFoundError, version

def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"

names = "torch triton numpy pandas pyarrow tensorboard gin-config pytest hypothesis pytest-timeout".split()
print(f"python {platform.python_version()}", *(f"{name} {found(name)}" for name in names), sep=", ")
PYTHON
    if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        WRONG+=("PyTorch sees no CUDA device: nothing was run")
        return 1
    fi
}

tests() {
    has pytest || return
    local op file named=() ignored=() jobs=$(($(nproc) / 2))
    ((jobs > 8)) && jobs=8
    ((jobs < 1)) && jobs=1
    for op in $1; do
        named+=(--op "$op")
    done
    for op in ops/*/; do
        for file in "tests/ops/test_$(basename "$op")"{,_*}.py; do
            ignored+=(--ignore "$file")
        done
    done
    export OMP_NUM_THREADS=1
    part "tests of the ops" 160 $TESTS_END "$PYTHON" benchmarks/verification.py --device "$DEVICE" --jobs "$jobs" "${named[@]}"
    # The options of the project name plugins that may be absent here.
    [ "$DEVICE" = cpu ] || part "other GPU tests" 60 $TESTS_END \
        "$PYTHON" -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib -m gpu tests "${ignored[@]}"
    unset OMP_NUM_THREADS
}

op_benchmarks() {
    local op effort=("${EFFORT[@]}")
    has pytest || effort+=(--skip-tests)
    for op in $1; do
        part "benchmark of $op" 75 $OPS_END \
            "$PYTHON" "benchmarks/ops/bench_$op.py" --device "$DEVICE" --results "$RESULTS" "${effort[@]}"
    done
}

DATASET=ml-1m

# Prepares what DATASET then names.
dataset() {
    [ -f "$DATA_DIR/ml-1m/dataset.json" ] && return
    if [ -n "${ML_1M_ZIP:-}" ]; then
        part "preparing ml-1m" 60 $END \
            "$PYTHON" preprocess_public_data.py --dataset=ml-1m --raw="$ML_1M_ZIP" --data_dir="$DATA_DIR" && return
    fi
    echo "== no ml-1m in $DATA_DIR: a synthetic dataset takes its place"
    DATASET=synthetic-ml-1m
    part "preparing the synthetic dataset" 60 $END "$PYTHON" preprocess_public_data.py --dataset=synthetic \
        --synthetic_users=$USERS --synthetic_items=3883 --name="$DATASET" --data_dir="$DATA_DIR"
}

throughput() {
    local config
    for config in hstu-sampled-softmax-n128-final hstu-sampled-softmax-n128-large-final; do
        part "throughput of $config" 60 $END "$PYTHON" benchmarks/e2e/train_throughput.py --steps "$STEPS" \
            --gin_config_file="configs/ml-1m/$config.gin" --gin_bindings="train_fn.dataset_name = '$DATASET'" \
            --data_dir="$DATA_DIR" --results "$RESULTS"
    done
}

ml_20m_step() {
    local bf16 bindings=()
    [ "$DEVICE" = cpu ] && bindings=(--gin_bindings="train_fn.local_batch_size = 4")
    for bf16 in True False; do
        part "ML-20M step, bf16 $bf16" 40 $END "$PYTHON" benchmarks/e2e/ml_20m_step.py --steps "$STEPS" \
            --gin_bindings="train_fn.main_module_bf16 = $bf16" "${bindings[@]}" \
            --profile "$OUT/ml_20m_step_bf16_$bf16.txt" --results "$RESULTS"
    done
}

wide_beam() {
    local effort=(--device "$DEVICE")
    [ "$DEVICE" = cpu ] && effort+=(--quick)
    part "beam search with 200 and 1,000 beams" 45 $END \
        "$PYTHON" benchmarks/e2e/wide_beam.py "${effort[@]}" --results "$RESULTS"
}

training() {
    part "101 epochs" $TRAIN_LIMIT $((SECONDS + TRAIN_LIMIT)) "$PYTHON" main.py \
        --gin_config_file=configs/ml-1m/hstu-sampled-softmax-n128-large-final.gin \
        --gin_bindings="train_fn.dataset_name = '$DATASET'" --data_dir="$DATA_DIR" --exps_dir="$OUT/exps"
}

summary() {
    if [ "$OUT" != "$RESULTS" ]; then
        tar -czf "$OUT/results.tar.gz" -C "$RESULTS" .
    fi
    echo "== $SECONDS s, ${#WRONG[@]} objections"
    printf '%s\n' "${WRONG[@]}"
}

suite() {
    local ops=${GPU_SUITE_OPS:-} path
    if [ -z "$ops" ]; then
        for path in benchmarks/ops/bench_*.py; do
            path=$(basename "$path" .py)
            ops+=" ${path#bench_}"
        done
    fi
    if environment; then
        tests "$ops"
        op_benchmarks "$ops"
        dataset
        throughput
        ml_20m_step
        wide_beam
        [ "${GPU_SUITE_TRAIN:-}" = 1 ] && training
    fi
    summary
    [ ${#WRONG[@]} = 0 ]
}

mkdir -p "$OUT" "$RESULTS"
suite 2>&1 | tee "$OUT/gpu_suite.log"
exit "${PIPESTATUS[0]}"
