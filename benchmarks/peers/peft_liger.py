"""peft_hf with Liger's Triton kernels (RoPE, RMSNorm, SwiGLU, fused linear cross-entropy)."""

import loop
from peft_hf import HF


class Liger(HF):
    name, liger = "peft_liger", True


if __name__ == "__main__":
    loop.main(Liger)
