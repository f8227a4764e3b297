#!/usr/bin/env bash
# What a GPU has to show, in about 9 minutes: is it right, how fast is it against both peers, where does the time go.
# Needs transformers, and GPT-2's vocabulary in TIKTOKEN_CACHE_DIR. Writes into the folder that is its only argument.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"

# right: the ticket's size and the complement's bits are checked by the run itself; so is a resumed run
python pmp.py --rho 0.7 --steps 200 --compile on --dtype bf16 --out "$out/tiny" | tee "$out/tiny.log"
timeout --signal=TERM 40 python pmp.py --rho 0.7 --steps 100000 --out "$out/stopped" | tee "$out/stopped.log" || test $? = 124
timeout --signal=TERM 30 python pmp.py --out "$out/stopped" --resume | tee -a "$out/stopped.log" || test $? = 124
python glue.py "$out/tiny/release" --standin --epochs 1 --results "$out/glue.jsonl" | tail -n 12 | tee "$out/glue.log"

# fast: gpt2, 32 x 256 tokens an update, against transformers compiled in bf16. A round that the time limit
# cuts leaves the lines of the kinds that were done
timeout 280 python experiments/bench.py --preset gpt2 --batch-size 32 --updates 40 --rounds 1 | tee "$out/bench.log" || test $? = 124
timeout 100 python experiments/bench.py --preset gpt2 --batch-size 32 --updates 10 --profile | tee "$out/profile.log" || test $? = 124
