#!/bin/bash
# bash benchmarks/peers/run_all.sh LIST...   lists: README.md. BUDGET seconds in all (default 540), SECONDS_EACH of timed steps (default 10).
# Appends JSON lines to $OUT/LIST.jsonl and errors to $OUT/errors.txt; goes on after a failure.
cd "$(dirname "$0")" || exit 1
export OUT=${OUT:-/tmp/out} PEERS_SITE=${PEERS_SITE:-/tmp/peers-site} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
PY=${PY:-python3}; END=$((SECONDS + ${BUDGET:-540})); mkdir -p "$OUT"
if [ ! -d "$PEERS_SITE/base" ] && [ -f ../../.carry/peers.tar.gz ]; then
  mkdir -p "$PEERS_SITE" && tar -xzf ../../.carry/peers.tar.gz -C "$PEERS_SITE" && echo "unpacked in $SECONDS s"
  nice $PY -m compileall -q -j 0 "$PEERS_SITE/base" "$PEERS_SITE/unsloth" "$PEERS_SITE/torchtune" >/dev/null 2>&1 &
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit,memory.used --format=csv,noheader 2>/dev/null | tee -a "$OUT/gpu.txt"

run() { # seconds, script, arguments
  local lim=$1 left=$((END - SECONDS)); shift
  if ((left < 30)); then echo "SKIPPED for time: $*"; return; fi
  ((lim > left)) && lim=$left
  echo "== $((SECONDS)) s: $*"
  timeout -k 5 "$lim" $PY "$@" ${EXTRA:-} 2>"$OUT/last_err.txt" | grep --line-buffered '^{"peer"' | tee -a "$OUT/$list.jsonl" | $PY show.py
  local rc=${PIPESTATUS[0]}
  if ((rc)) || grep -q '^Traceback' "$OUT/last_err.txt"; then
    { echo "== rc $rc: $*"; tail -c 6000 "$OUT/last_err.txt"; } >>"$OUT/errors.txt"
    grep -v '^ ' "$OUT/last_err.txt" | tail -n 4 | cut -c1-300; echo "   (rc $rc)"
  fi
}
M=${MODEL:-llama2-7b}
S="--steps ${STEPS:-8} --warmup 3 --seconds ${SECONDS_EACH:-10}"
W="--rank 16 --targets all"                                  # all seven linears
Off="--batch 4 --seq 2048 --checkpoint off $S"               # 8192 random tokens, nothing recomputed
OnOff="--batch 4,4 --seq 2048,2048 --checkpoint on,off $S"   # the same model with recomputation, then without
# Alpaca-like: rows of at most 8192 tokens, packed; or 16 sequences padded to the longest
A="--data alpaca-like --checkpoint off --alpaca-steps ${ASTEPS:-24} --warmup 5 --seconds ${SECONDS_EACH:-10}"
Pack="--batch 4 --seq 2048 --packing on $A"
Both="--batch 16,4 --seq 1024,2048 --packing off,on $A"
Pad="--batch 16 --seq 1024 $A"
Base="none;nf4;nf4,fp8=off;fp8"

for list in "$@"; do
  w="--model $M $W"
  case $list in
  roof) run 90 roofline.py ;;
  main) # the first to be published: 7B, r 16
    run 240 loraloom_bench.py $w $Off --variants "${VARIANTS:-$Base;nf4,recompute=full;nf4,recompute=offload}"
    run 130 torchtune_bench.py $w --quant none $Off --compile on
    run 160 torchtune_bench.py $w --quant nf4 $Off --compile on
    run 150 unsloth_bench.py $w --quant nf4 $OnOff
    run 120 unsloth_bench.py $w --quant none $Off ;;
  ours) run 300 loraloom_bench.py $w $Off --variants "${VARIANTS:-$Base;nf4,recompute=gate_up;nf4,recompute=full;nf4,recompute=offload;none,fast=off}" ;;
  alpaca)
    run 150 loraloom_bench.py $w $Pack --variants "${VARIANTS:-none;nf4}"
    run 100 loraloom_bench.py $w --batch 8 --seq 2048 --packing on $A --variants "${VARIANTS:-none;nf4}"   # twice as much a pass
    run 130 torchtune_bench.py $w --quant none $Pack --compile on ;;
  small|big) # 1B, 8B
    m=llama3.2-1b; [ $list = big ] && m=llama3.1-8b
    run 200 loraloom_bench.py --model $m $W $Off --variants "${VARIANTS:-$Base}"
    run 130 torchtune_bench.py --model $m $W --quant none $Off --compile on
    run 150 unsloth_bench.py --model $m $W --quant none $Off
    [ $list = big ] && run 130 unsloth_bench.py --model $m $W --quant nf4 $Off ;;
  qv) # the published settings of article 2: r 8 on q and v
    q="--model $M --rank 8 --targets qv"
    run 150 loraloom_bench.py $q $Off --variants "${VARIANTS:-none;nf4}"
    run 130 torchtune_bench.py $q --quant none $Off --compile on
    run 100 peft_hf.py $q --quant none $Off ;;
  r256)
    run 150 loraloom_bench.py --model $M --rank 256 --targets all $Off --variants "${VARIANTS:-none;nf4}"
    run 130 torchtune_bench.py --model $M --rank 256 --targets all --quant none $Off --compile on ;;
  lengths) # the same 8192 tokens as shorter and as longer sequences
    s="--batch 16,2 --seq 512,4096 --checkpoint off,off $S"
    run 200 loraloom_bench.py $w $s --variants "${VARIANTS:-none;nf4}"
    run 160 torchtune_bench.py $w --quant none $s --compile on ;;
  general) # without fused layers, as other architectures run: eager and compiled
    run 200 loraloom_bench.py $w $Off --variants "${VARIANTS:-none;none,fast=off;none,fast=off,compile=on}" ;;
  stock) # PEFT, Liger and LitGPT beside us, bf16
    run 110 peft_hf.py $w --quant none $OnOff
    run 110 peft_liger.py $w --quant none $OnOff
    run 110 litgpt_bench.py $w --quant none $OnOff
    run 110 peft_hf.py $w --quant nf4 $OnOff ;;
  recompute) # the other tools with recomputation
    run 130 torchtune_bench.py $w --quant none --batch 4 --seq 2048 --checkpoint on $S --compile on
    run 160 torchtune_bench.py $w --quant nf4 --batch 4 --seq 2048 --checkpoint on $S --compile on
    run 130 unsloth_bench.py $w --quant none --batch 4 --seq 2048 --checkpoint on $S ;;
  padded) # what the tools make of Alpaca-like lengths otherwise
    run 110 peft_hf.py $w --quant none $Both
    run 200 unsloth_bench.py $w --quant none $Both
    run 80 litgpt_bench.py $w --quant none $Pad
    run 110 peft_liger.py $w --quant none $Both
    run 120 unsloth_bench.py $w --quant none $Pack --xformers on
    run 100 peft_hf.py $w --quant none $Pack --attn flex_attention ;;
  *) echo "no list $list" ;;
  esac
done
rm -f "$OUT/last_err.txt"; echo "done at $SECONDS s"; wc -l "$OUT"/*.jsonl 2>/dev/null
