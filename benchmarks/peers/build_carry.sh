#!/bin/bash
# Build .carry/peers.tar.gz: the peers' packages for a GPU machine without a network (CPython 3.12, x86-64, torch 2.11+cu130), trimmed.
# Run where pip works: bash benchmarks/peers/build_carry.sh
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd); W=${W:-/tmp/peers-whl}; S=$(mktemp -d); trap 'rm -rf "$S"' EXIT
mkdir -p "$W" "$ROOT/.carry"
plat=(); for p in manylinux_2_39 manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do plat+=(--platform ${p}_x86_64); done

put() { # folder, package==version ...: download without dependencies, unpack into the folder
  local d=$S/$1; shift; mkdir -p "$d"
  for r in "$@"; do
    local n=${r%%==*} v=${r##*==} f; n=${n//-/_}
    f=$(ls "$W/$n-$v"-*.whl 2>/dev/null | head -1 || true)
    if [ -z "$f" ]; then
      if [ "$n" = antlr4_python3_runtime ]; then python3 -m pip wheel -q --no-deps -w "$W" "$r"          # source only, pure Python
      else python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${plat[@]}" -d "$W" "$r"; fi
      f=$(ls "$W/$n-$v"-*.whl | head -1)
    fi
    unzip -q -o "$f" -d "$d"
  done
}
put base bitsandbytes==0.50.2 peft==0.21.2 liger-kernel==0.8.5 datasets==4.8.5 dill==0.4.1 multiprocess==0.70.19 docstring-parser==0.18.0 typeguard==4.6.0
put unsloth unsloth==2026.10.9 unsloth-zoo==2026.10.9 trl==1.15.0 tyro==1.0.17 msgspec==0.22.0 hf-transfer==0.1.9 cut-cross-entropy==25.1.1 \
    nest-asyncio==1.6.0 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 torchao==0.18.0
put xformers xformers==0.0.35 nvidia-cuda-runtime-cu12==12.8.90
put torchtune torchtune==0.6.1 torchao==0.13.0 torchdata==0.11.0 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 blobfile==3.3.0 \
    pycryptodomex==3.24.2 kagglehub==1.0.3 kagglesdk==0.1.38
put loraloom pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5    # what loraloom itself needs there
put litgpt litgpt==0.5.13 jsonargparse==4.41.0

cd "$S"
find base/bitsandbytes -name '*.so' ! -name '*_cuda130.so' ! -name '*_cpu.so' -delete
find unsloth torchtune -path '*/torchao/*' -name '*.so*' -delete          # compiled for other torch versions; NF4Tensor is Python
rm -rf unsloth/studio unsloth/unsloth_cli unsloth/test unsloth/trl/experimental/*/templates
mv xformers/nvidia/cuda_runtime/lib/libcudart.so.12 xformers/; rm -rf xformers/nvidia xformers/nvidia_*
find . -name __pycache__ -prune -exec rm -rf {} +
tar -cf - . | gzip -9 >"$ROOT/.carry/peers.tar.gz"
du -sh --apparent-size . ; ls -la "$ROOT/.carry/peers.tar.gz"
