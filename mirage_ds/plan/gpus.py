"""Peak FLOP/s of known GPUs (gpus.yaml). Imports no torch.

NVIDIA's own numbers, dense: where a data sheet prints them "with sparsity", half of that. bf16 is that of the tensor
cores with float32 accumulation (fp16's is the same), tf32 theirs for float32 products where torch may use them, fp32
that of the other cores.

H100, A100: the architectures' white papers ("NVIDIA H100 Tensor Core GPU Architecture", 2023, tables 2 and 3; "NVIDIA
A100 Tensor Core GPU Architecture", 2020, table 1). H100 NVL, H200, A40, L40S, B200 (HGX B200, an eighth): their data
sheets on nvidia.com. RTX A6000, RTX 3090: "NVIDIA Ampere GA102 GPU Architecture", 2021, appendices; RTX 4090: "NVIDIA
Ada GPU Architecture", 2022, appendix A.
"""

from pathlib import Path
from typing import NamedTuple

import yaml


class Peak(NamedTuple):
    """FLOP/s by the precision of matrix products."""

    bf16: float
    tf32: float
    fp32: float


_TABLE = yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8"))
PEAKS = {name: Peak(*(number * 1e12 for number in numbers)) for name, numbers in _TABLE.items()}
H100_SXM, A100 = PEAKS["H100 80GB HBM3"], PEAKS["A100-SXM4-80GB"]
