"""The weight's gradient on a GPU, whose products in bf16 end in float32: rounded once, whatever the chunks."""

from __future__ import annotations

import pytest

from gpu.head import weight_errors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [128, 1024, 4096])
def test_a_bf16_weights_gradient_is_rounded_once(rows: int) -> None:
    found, whole = weight_errors("cuda", rows, positions=4096, vocabulary=32768, hidden=1024)
    print(f"{rows} positions a chunk: {found:.2e}, one product {whole:.2e}")
    assert found <= 1.1 * whole
