#!/usr/bin/env bash
# The whole workflow on a real model: download, data, fine-tune, evaluate, merge and verify, chat, report.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

rm -rf runs/demo out/demo
say python examples/subtraction.py runs/subtraction
say loraloom download smollm2-135m-instruct
say loraloom data runs/subtraction/train.jsonl -m smollm2-135m-instruct --set data.prompt=plain
say loraloom train examples/subtraction.yaml
say loraloom eval runs/demo --answers 500
say loraloom merge runs/demo out/demo
say loraloom chat runs/demo --compare --max-new-tokens 16 --ask "Question: What is 71 minus 28?
Answer:"
say loraloom report runs/demo
