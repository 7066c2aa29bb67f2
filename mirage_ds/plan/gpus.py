"""Peak FLOP/s of known GPUs. Imports nothing.

NVIDIA's own numbers, dense: where a data sheet prints them "with sparsity", half of that. bf16 is that of the tensor
cores with float32 accumulation (fp16's is the same), tf32 theirs for float32 products where torch may use them, fp32
that of the other cores.

H100, A100: the architectures' white papers ("NVIDIA H100 Tensor Core GPU Architecture", 2023, tables 2 and 3; "NVIDIA
A100 Tensor Core GPU Architecture", 2020, table 1). H100 NVL, H200, A40, L40S, B200 (HGX B200, an eighth): their data
sheets on nvidia.com. RTX A6000, RTX 3090: "NVIDIA Ampere GA102 GPU Architecture", 2021, appendices; RTX 4090: "NVIDIA
Ada GPU Architecture", 2022, appendix A.
"""

from typing import NamedTuple


class Peak(NamedTuple):
    """FLOP/s by the precision of matrix products."""

    bf16: float
    tf32: float
    fp32: float


def _tera(bf16: float, tf32: float, fp32: float) -> Peak:
    return Peak(bf16 * 1e12, tf32 * 1e12, fp32 * 1e12)


H100_SXM = _tera(989.4, 494.7, 66.9)
HOPPER_NVL = _tera(835.5, 417.5, 60)
A100 = _tera(312, 156, 19.5)

# By torch.cuda.get_device_name without "NVIDIA ", whole: "… D", "… Laptop GPU", "… Ti" and parts of a GPU ("… MIG
# 1g.10gb") are other GPUs.
PEAKS = {
    "H100 80GB HBM3": H100_SXM,
    "H100 PCIe": _tera(756, 378, 51.2),
    "H100 NVL": HOPPER_NVL,
    "H200": H100_SXM,
    "H200 NVL": HOPPER_NVL,
    "A100-SXM4-40GB": A100,
    "A100-SXM4-80GB": A100,
    "A100-PCIE-40GB": A100,
    "A100 80GB PCIe": A100,
    "A40": _tera(149.7, 74.8, 37.4),
    "RTX A6000": _tera(154.8, 77.4, 38.7),
    "L40S": _tera(362.05, 183, 91.6),
    "B200": _tera(2250, 1125, 75),
    "GeForce RTX 4090": _tera(165.2, 82.6, 82.6),
    "GeForce RTX 3090": _tera(71, 35.6, 35.6),
}
