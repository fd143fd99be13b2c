#!/usr/bin/env bash
# What a GPU is asked first, most telling first, within eight minutes and without a network.
#
#     benchmarks/gpu.sh [--tiny] [--wheels FOLDER] [OUT]
#
# OUT (else the variable OUT, else gpu-results) gets gpu.md, renewed after each step: card, driver, versions, commit,
# a table of the steps with their exit codes, and all that they print; to be copied to benchmarks/results/. Beside it
# output.md, to which a step writes while it runs, and trace.json.gz. Needs torch 2.11 or newer, torchvision, timm,
# transformers, scipy, OpenCV and pytest; what else there is, pydantic and what that needs, deformops, comes as wheels
# in FOLDER. --tiny tries all of it at small sizes, on a CPU without what needs CUDA. PYTHON names the interpreter,
# COMMIT the commit where there is no git. Exit code: 1 if a step has failed, 2 if nothing can be run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

tiny="" wheels="" out="${OUT:-gpu-results}"
while (($#)); do
    case $1 in
    --tiny) tiny=yes ;;
    --wheels) wheels=${2:?--wheels: a folder is expected} && shift ;;
    -*) echo "gpu.sh: $1: --tiny, --wheels FOLDER or a folder is expected" >&2 && exit 2 ;;
    *) out=$1 ;;
    esac
    shift
done
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
: >"$out/output.md"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE

if [[ $wheels ]]; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl 2>&1 |
        tee -a "$out/output.md"
    PYTHONPATH="$PYTHONPATH:$site"
fi

device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') || exit 2
if [[ $device == cpu && ! $tiny ]]; then
    echo "gpu.sh: no CUDA device; --tiny tries the script itself on a CPU" >&2
    exit 2
fi
[[ $tiny ]] && budget=${BUDGET:-180} || budget=${BUDGET:-475} # seconds of all steps together
commit=${COMMIT:-}
if [[ ! $commit ]] && commit=$(git rev-parse --short HEAD 2>/dev/null); then
    git diff --quiet HEAD || commit="$commit and changes"
fi
card="CPU" driver="none"
if [[ $device == cuda ]]; then
    IFS=, read -r card driver < <(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)
fi
versions=$("$python" -c 'import importlib.metadata as m; print(", ".join(
    f"{p} {m.version(p)}" for p in ("torch", "torchvision", "timm", "transformers", "scipy")))')

rows=() failed=0

render() { # renew gpu.md
    {
        echo "# $card, $(date -u +%F)"
        echo
        echo "Commit ${commit:-unknown}; driver${driver:+ ${driver# }}; $versions.${tiny:+ Small sizes, to try the script: no figures.}"
        printf '\n| step | exit code | seconds |\n|---|---|---|\n'
        printf '%s\n' "${rows[@]}"
        cat "$out/output.md"
    } >"$out/.gpu.md" && mv "$out/.gpu.md" "$out/gpu.md"
}

left_out() { # NAME WHY
    echo "$1: left out: $2"
    rows+=("| $1 | left out: $2 | |")
    render
}

step() { # NAME SECONDS COMMAND...: run it for at most so long, and no longer than the budget
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    ((limit > budget - SECONDS)) && limit=$((budget - SECONDS))
    if ((limit < 5)); then
        left_out "$name" "no time"
        return
    fi
    printf '\n## %s\n\n' "$name" | tee -a "$out/output.md"
    timeout --kill-after=5 "$limit" "$@" </dev/null 2>&1 | tee -a "$out/output.md"
    code=${PIPESTATUS[0]}
    ((code == 0)) || failed=1
    ((code == 124 || code == 137)) && code="$code (stopped after $limit s)"
    rows+=("| $name | $code | $((SECONDS - start)) |")
    render
}

on_cuda() { # as step, where there is CUDA
    if [[ $device == cuda ]]; then step "$@"; else left_out "$1" "needs CUDA"; fi
}

# the project's pytest settings ask for plug-ins and Ray that need not be there
tests=("$python" -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q -ra tests/gpu)
if [[ $tiny ]]; then
    export OMP_NUM_THREADS=1
    operator=(--tiny --repetitions 2)
    small=(--tiny --repetitions 1)
    training=("${small[@]}" --size 64 --objects 3)
    batches=(2)
else
    operator=(--parts "time,bound" --repetitions 10)
    small=(--repetitions 10)
    training=(--repetitions 6 --size 1024 --objects 7)
    batches=(8 16)
fi
on=(--device "$device")
training+=("${on[@]}" --precision bfloat16 --no-memory)
ours="Mask2Former,MP-Former,MP-Former with shared points,channels-last MP-Former"

on_cuda "tests/gpu" 100 "${tests[@]}"
step "operator, bfloat16" 60 "$python" benchmarks/deform_attn.py "${on[@]}" --dtype bfloat16 "${operator[@]}"
for batch in "${batches[@]}"; do
    step "training step, batch $batch" 90 "$python" benchmarks/train_step.py "${training[@]}" \
        --images "$batch" --only "transformers,$ours"
done
on_cuda "training step, batch ${batches[-1]}, compiled" 130 "$python" benchmarks/train_step.py "${training[@]}" \
    --images "${batches[-1]}" --only "MP-Former,compiled MP-Former"
step "attention with masks" 45 "$python" benchmarks/attention.py "${on[@]}" "${small[@]}"
step "inference" 40 "$python" benchmarks/inference.py "${small[@]}" "${on[@]}" --precision bfloat16 --no-memory \
    --size "$([[ $tiny ]] && echo 64 || echo 1024)"
step "profiler trace" 40 "$python" benchmarks/train_step.py "${training[@]}" --images "${batches[0]}" \
    --only MP-Former --trace "$out/trace.json.gz"
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [[ $device == cuda && -x $sanitizer ]]; then
    # without torch's pools, whose blocks hide what is written past a tensor's end
    kernels=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --error-exitcode 9)
    chosen=(-k "not test_step and not memory and not graph and not streams")
    step "compute-sanitizer, memcheck" 90 "${kernels[@]}" --tool memcheck "${tests[@]}" "${chosen[@]}"
    step "compute-sanitizer, racecheck" 60 "${kernels[@]}" --tool racecheck "${tests[@]}" "${chosen[@]}"
else
    left_out "compute-sanitizer" "$([[ $device == cuda ]] && echo "not installed" || echo "needs CUDA")"
fi
echo
printf '%s\n' "${rows[@]}"
echo "$out/gpu.md"
exit $failed
