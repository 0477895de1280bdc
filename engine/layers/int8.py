"""A product of few tokens with int8 weights, on a card: it reads half of what 16 bits would.

Unpacking before each product costs a card more than 16 bits do. This kernel unpacks what it
multiplies in registers. It is used where Triton is there, and gives what unpacking gives.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from engine.layers.quantized import QuantizedLinear, is_int8
from engine.relative_error import relative_error

# With more tokens the product takes longer than unpacking, and torch's own is faster.
_MAX_TOKENS = 64
# The largest relative error of a product beside that of the unpacked weights.
_MAX_ERROR = 0.02

_CONFIGS = [
    triton.Config({"BLOCK_OUT": out, "BLOCK_IN": inner}, num_warps=4, num_stages=stages)
    for out, inner, stages in ((16, 256, 3), (32, 128, 4), (32, 256, 3), (64, 128, 4))
]


@triton.autotune(  # type: ignore[untyped-decorator]
    configs=_CONFIGS, key=["out_features", "in_features", "BLOCK_TOKENS"]
)
@triton.jit  # type: ignore[untyped-decorator]
def _int8_product(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, scale_ptr, out_ptr, tokens, out_features, in_features,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """x [tokens, in] by weight [out, in] and scale [out] to [tokens, out], all contiguous."""
    rows = tl.arange(0, BLOCK_TOKENS)[:, None]
    columns = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_IN)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        at = start + inner
        inside = at < in_features
        x = tl.load(
            x_ptr + rows * in_features + at[None, :],
            mask=(rows < tokens) & inside[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + columns[None, :].to(tl.int64) * in_features + at[:, None],
            mask=(columns < out_features)[None, :] & inside[:, None],
            other=0,
        )
        total += tl.dot(x, weight.to(x.dtype))
    scale = tl.load(scale_ptr + columns, mask=columns < out_features, other=0.0)
    total *= scale.to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows * out_features + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(rows < tokens) & (columns < out_features)[None, :],
    )


class Int8Kernel:
    """What QuantizedLinear calls instead of unpacking its weights."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether these are few enough tokens, in half precision."""
        few = x.numel() // x.shape[-1] <= _MAX_TOKENS
        return few and x.dtype in (torch.bfloat16, torch.float16)

    def product(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [..., in] by int8 weight [out, in], its scale [out, 1] and a bias, to [..., out]."""
        out_features, in_features = weight.shape
        rows = x.reshape(-1, in_features).contiguous()
        out = torch.empty(len(rows), out_features, dtype=x.dtype, device=x.device)

        def grid(config: Any) -> tuple[int]:
            return (triton.cdiv(out_features, config["BLOCK_OUT"]),)

        with torch.cuda.device_of(rows):  # of several cards Triton takes the current one
            _int8_product[grid](
                rows, weight, scale, out, len(rows), out_features, in_features,
                BLOCK_TOKENS=max(16, triton.next_power_of_2(len(rows))),
            )  # fmt: skip
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], out_features)


@torch.inference_mode()
def use_kernel(model: Any) -> None:
    """Let a model's layers on cards use the kernel, checked on one layer of each shape.

    Raises RuntimeError where its products are not those of the unpacked weights, or whatever Triton
    raises where it cannot compile.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and is_int8(m)]
    kernel = Int8Kernel()
    for layer in {(x.weight.shape, x.weight.device): x for x in layers}.values():
        check(kernel, layer, model.dtype)
    for layer in layers:
        layer.kernel = kernel


def check(kernel: Int8Kernel, layer: QuantizedLinear, dtype: torch.dtype) -> None:
    """Compare the kernel's product with the unpacked weights', for one token and for many."""
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 5, 16, 33, _MAX_TOKENS):
        x = torch.randn(tokens, layer.in_features, generator=generator)
        x = x.to(layer.weight.device, dtype)
        if not kernel.takes(x):
            raise RuntimeError(f"there is no kernel for {dtype}")
        found = kernel.product(x, layer.weight, layer.weight_scale, layer.bias)
        error = relative_error(found, layer.reference(x))
        if not error < _MAX_ERROR:
            raise RuntimeError(f"our kernel's products are {error:.0%} off")
