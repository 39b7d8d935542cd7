#!/bin/sh
# Test the kernels, then time a step and its stages on the GPU at hand. Each part has a time limit, all of them 8 minutes,
# and a part that fails or is cut off keeps the rows it wrote. Nothing is installed: PYTHON has torch, triton and pytest.
#     PYTHON=python3 sh benchmarks/gpu.sh           # rows go to benchmarks/results, or to $SGC_BENCH_RESULTS
#     PYTHON=python3 sh benchmarks/gpu.sh --smoke   # every line of it in a minute or two, on a CPU too; writes no rows
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
export PYTHONPATH=. PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1
failed=""

part() { # part NAME SECONDS COMMAND...
    name=$1 limit=$(($2 * patience))
    shift 2
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" || { echo "== $name ended with $?"; failed="$failed $name"; }
}

plugins="-p no:cacheprovider"
"$PYTHON" -c 'import xdist' 2>/dev/null && plugins="$plugins -n 4"
tests=tests/kernels patience=1
case " $* " in
*" --smoke "*) tests=tests/kernels/test_dispatch.py patience=5 ;; # Triton's interpreter on a busy CPU takes its time
esac
part tests 120 "$PYTHON" -m pytest -q $plugins $tests
part step 120 "$PYTHON" benchmarks/bench_step.py --seconds 12 "$@"
part sparsify 35 "$PYTHON" benchmarks/bench_sparsify.py --seconds 2 "$@"
part project 35 "$PYTHON" benchmarks/bench_project.py --seconds 2 "$@"
part recover 50 "$PYTHON" benchmarks/bench_recover.py --seconds 2 "$@"
part train 75 "$PYTHON" benchmarks/bench_train.py --seconds 2 "$@"
sweeps="--sweep entries --sweep sketch_size --sweep sparsity --sweep tensors"
part growth 45 "$PYTHON" benchmarks/bench_growth.py --seconds 1 $sweeps "$@"
[ -z "$failed" ] || { echo "not all went well:$failed"; exit 1; }
