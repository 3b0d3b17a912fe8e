"""AdapterH: Houlsby's bottleneck adapters, two in each block.

    h + adapter(attention(h)),   h + adapter(mlp(h)),   adapter(y) = y + W_up f(W_down y + b_down) + b_up

Each stands on the output of the attention's and of the mlp's last linear layer, before the residual is added:
2 (2 D r + r + D) parameters a block.

source  Houlsby et al. 2019, arXiv:1902.00751, section 2.1; the count of Hu et al. 2021, arXiv:2106.09685, 5.1
"""

from __future__ import annotations

from dataclasses import dataclass

from ._bottleneck import Bottleneck


@dataclass(frozen=True, kw_only=True)
class AdapterH(Bottleneck):
    def auto_targets(self) -> tuple[str, ...]:
        return ("o", "down")
