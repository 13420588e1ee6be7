#!/usr/bin/env bash
# Whether crossbars work on this machine's GPU, and what they cost there, in at most 8 minutes:
#
#     recipes/gpu_check.sh [FOLDER]
#
# runs the tests marked "gpu", then recipes/benchmark.py on three models, in float32, bfloat16 and compiled. The package
# need not be installed, only what it needs. FOLDER (./gpu-check) gets the logs, the benchmark's JSON and summary.md,
# which is also printed. A part that fails or takes too long does not stop the others; the exit status is 0 if none did.
#
# Environment: PYTHON, the interpreter; SECONDS_LEFT, for all parts together; WORKERS, processes for the tests (a core
# each, at most 8); CUDA_VISIBLE_DEVICES, which GPU.

set -u
folder=$(realpath -m "${1:-gpu-check}")
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$folder" || exit 2
python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_LEFT:-460}))
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4} # of each process
summary=$folder/summary.md
rm -f "$folder"/{summary.md,tests.log,benchmark.log,minilm.json,smollm2.json,deit-tiny.json,compiled.json}

# The first line is how much smaller than on a card of 64 GiB and more the batches have to be.
if ! found=$("$python" - 2>&1 <<'PYTHON'
import importlib.metadata as metadata
import math
import platform

import torch

if not torch.cuda.is_available():
    raise SystemExit("no CUDA device: there is nothing to check here")
gpu = torch.cuda.get_device_properties(0)
gib = gpu.total_memory / 2**30
print(2 ** max(0, math.ceil(6 - math.log2(gib))))
print(f"# {gpu.name}, {gib:.0f} GiB, compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}\n")
names = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "timm", "aihwkit-lightning")
for name in names:
    try:
        print(f"{name} {metadata.version(name)}", end=", ")
    except metadata.PackageNotFoundError:
        print(f"no {name}", end=", ")
print(f"Python {platform.python_version()}, {torch.get_num_threads()} threads")
PYTHON
); then
    echo "$found" | tail -n 5 >&2
    exit 2
fi
smaller=$(grep -m1 -xE '[0-9]+' <<<"$found")
{ sed -n '/^# /,$p' <<<"$found"; command -v git >/dev/null && git log -1 --format='%nhf_reram at %h %s' 2>/dev/null; } |
    tee "$summary"

rows="" failed=0

# part NAME SECONDS LOG COMMAND...
part() {
    local name=$1 limit=$2 log=$3 left=$((deadline - SECONDS)) start=$SECONDS status=0 verdict
    shift 3
    limit=$((limit < left ? limit : left))
    if [ "$limit" -lt 20 ]; then
        verdict="skipped: no time left" failed=1
    else
        echo "== $name: $*" >>"$log"
        timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1 || status=$?
        case $status in
            0) verdict=passed ;;
            124 | 137) verdict="stopped after $limit s" failed=1 ;;
            *) verdict="failed with status $status" failed=1 ;;
        esac
    fi
    rows+="| $name | $verdict | $((SECONDS - start)) |"$'\n'
    printf '\n## %s: %s\n\n' "$name" "$verdict" | tee -a "$summary"
}

# What of a log, from its last "== " line on, belongs in the summary.
show() {
    local log=$1 pattern=$2
    [ -f "$log" ] || return 0
    tac "$log" | sed '/^== /q' | tac | grep -E "$pattern" | cut -c1-300 | head -n 60 | sed 's/^| | time/\n&/' | tee -a "$summary"
}

benchmark() {
    local name=$1 limit=$2 json=$3
    shift 3
    part "$name" "$limit" "$folder/benchmark.log" "$python" recipes/benchmark.py --output "$folder/$json.json" "$@"
    show "$folder/benchmark.log" '^\||, batch |^a chip|^[A-Za-z.]*(Error|Exception|Interrupt)'
}

batch() {
    echo $(($1 / smaller > 0 ? $1 / smaller : 1))
}

workers() {
    local cores
    cores=$(nproc)
    echo $((cores < 8 ? cores : 8)) # each of them holds a CUDA context
}

part tests 150 "$folder/tests.log" "$python" -m pytest tests/gpu -m gpu -n "${WORKERS:-$(workers)}" --dist load -q \
    --tb short -p no:cacheprovider --durations 5
show "$folder/tests.log" '^(FAILED|ERROR|E  )|^[0-9]+ (passed|failed)|[0-9]+ (passed|failed|skipped|error).* in '

benchmark MiniLM 110 minilm --model minilm --batch_size "$(batch 256)" --pairs 5 --parts training inference chip \
    --variants "crossbar, no retention loss" "retention loss: drift (default)" "drift, 8-bit DAC and ADC" \
    "bfloat16: digital" "bfloat16: drift" "fused kernels: drift" "bfloat16, fused kernels: drift" \
    "8-bit DAC and ADC" chip "bfloat16: crossbar" "aihwkit-lightning: input ranges, weight noise, 8-bit DAC and ADC"

benchmark "MiniLM, compiled" 90 compiled --model minilm --batch_size "$(batch 256)" --pairs 5 --parts training \
    --memory False --variants "bfloat16 and torch.compile: digital" "bfloat16 and torch.compile: drift"

benchmark SmolLM2-135M 100 smollm2 --model smollm2 --batch_size "$(batch 32)" --length 512 --pairs 5 \
    --parts training --variants "retention loss: drift (default)" "bfloat16: digital" "bfloat16: drift" \
    "bfloat16, fused kernels: drift"

benchmark DeiT-Tiny 90 deit-tiny --model deit-tiny --batch_size "$(batch 512)" --pairs 5 --parts training \
    --variants "retention loss: drift (default)" "drift, 8-bit DAC and ADC" "bfloat16: digital" "bfloat16: drift" \
    "bfloat16, fused kernels: drift"

{ printf '\n## Parts\n\n| part | | seconds |\n| --- | --- | --- |\n%s' "$rows"; } | tee -a "$summary"
exit $failed
