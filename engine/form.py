"""The form of a model on a CPU, chosen by measuring.

Most CPUs have no instructions for half precision: there torch's products of it are slower than
those of float32, and take longer in proportion to the batch. The weights may then be fp16 with
sums in float32 (engine.linear), and single operations larger (engine.fused). Weights in 8 bits
are always read by such products, as unpacking them would take longer than 16 bits do.
"""

import time
from collections import Counter
from collections.abc import Callable
from math import inf, prod
from typing import Any, Literal

import torch
import torch.nn.functional as F

from engine.fused import Part, fuse_norms, share_products
from engine.linear import (
    HalfExperts,
    HalfLinear,
    Int8Experts,
    Int8Linear,
    WideEmbedding,
    fits_fp16,
    has_int8_products,
    is_available,
)
from engine.packed_attention import can_absorb
from engine.quantized import QuantizedLinear, bits_of, is_int8

Form = Literal["as it is", "fp16 weights", "float32"]

# What is measured: the tokens in a step of one request, and of a full batch.
TOKENS = (1, 16)
# How often each form is tried.
ROUNDS = 2
# How much faster a form must be than one before it, so that a start under load chooses as an idle
# one does.
CLEARLY = 1.2


def has_fused_experts(module: Any) -> bool:
    """Whether a module is a mixture's experts, as transformers stacks them: [experts, out, in]."""
    matrices = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    stacked = all(isinstance(x, torch.nn.Parameter) and x.dim() == 3 for x in matrices)
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    plain = plain and all(name == "act_fn" for name, _ in module.named_children())
    return stacked and plain and hasattr(module, "act_fn") and len(list(module.parameters())) == 2


def replaceable(model: Any) -> dict[str, Any]:
    """The linear layers and stacks of experts that may change their form, by their names.

    MLA's up-projection is not among them: attention reads its matrix.
    """
    absorbed = {f"{name}.kv_b_proj" for name, module in model.named_modules() if can_absorb(module)}
    return {
        name: module
        for name, module in model.named_modules()
        if name not in absorbed and (type(module) is torch.nn.Linear or has_fused_experts(module))
    }


def matrices_of(module: Any) -> list[torch.Tensor]:
    """The weights of a linear layer, or of all experts of a stack, [out, in] each."""
    if isinstance(module, torch.nn.Linear):
        return [module.weight]
    return [*module.gate_up_proj, *module.down_proj]


def products_of(form: Form, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A matrix's product in a form, [tokens, in] to [tokens, out]."""
    if form == "fp16 weights":
        return HalfLinear(weight)
    kept = weight if form == "as it is" else weight.float()
    return lambda x: F.linear(x, kept)


def milliseconds_of(
    product: Callable[[torch.Tensor], torch.Tensor], width: int, dtype: torch.dtype, tokens: int
) -> float:
    """The shortest of a few calls."""
    x = torch.ones(tokens, width, dtype=dtype)
    product(x)
    shortest = inf
    calls = 0
    began = time.perf_counter()
    while calls < 2 or (calls < 50 and time.perf_counter() - began < 0.01):
        started = time.perf_counter()
        product(x)
        shortest = min(shortest, time.perf_counter() - started)
        calls += 1
    return 1000 * shortest


@torch.inference_mode()
def measure_forms(model: Any) -> dict[Form, list[float]]:
    """The milliseconds of a step's products in each form, for each number of TOKENS.

    Measured on one matrix of each of the model's widths, and multiplied up.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    examples: dict[tuple[int, ...], torch.Tensor] = {}
    for module in replaceable(model).values():
        for matrix in matrices_of(module):
            counts[tuple(matrix.shape)] += 1
            examples[tuple(matrix.shape)] = matrix
    forms: list[Form] = ["as it is", "fp16 weights", "float32"]
    if not is_available():
        forms.remove("fp16 weights")
    taken: dict[Form, list[float]] = {form: [0.0] * len(TOKENS) for form in forms}
    for width, count in counts.items():
        products = {form: products_of(form, examples[width]) for form in forms}
        for n, tokens in enumerate(TOKENS):
            # In turns, so that what else the machine does meanwhile comes to all alike.
            shortest = dict.fromkeys(forms, inf)
            for form in forms * ROUNDS:
                dtype = model.dtype if form == "as it is" else torch.float32
                milliseconds = milliseconds_of(products[form], width[1], dtype, tokens)
                shortest[form] = min(shortest[form], milliseconds)
            for form in forms:
                taken[form][n] += count * shortest[form]
    return taken


def fastest_form(taken: dict[Form, list[float]]) -> Form:
    """The first form than which none is clearly faster, and slower for no number of tokens."""
    chosen: Form = "as it is"
    for form, times in taken.items():
        is_clear = CLEARLY ** len(TOKENS) * prod(times) < prod(taken[chosen])
        if is_clear and all(a <= b for a, b in zip(times, taken[chosen], strict=True)):
            chosen = form
    return chosen


def computes_alike(half: Any, experts: Any) -> bool:
    """Whether a mixture's experts do no more than ours in their place: some clamp, or shift."""
    weight = experts.gate_up_proj
    choices = torch.tensor([[0, 1], [len(weight) - 1, 0]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    for scale in (1.0, 100.0):
        x = scale * torch.linspace(-1, 1, 2 * weight.shape[2]).reshape(2, -1)
        wanted = experts(x.to(weight.dtype), choices, weights.to(weight.dtype)).float()
        if not (half(x, choices, weights) - wanted).norm() < 0.05 * wanted.norm():
            return False
    return True


@torch.inference_mode()
def convert(model: Any, form: Form) -> None:
    """Give a model's linear layers a form, one after the other, and the rest float32.

    A layer whose weights do not fit fp16 has them in float32.
    """
    if form == "as it is":
        return
    if form == "fp16 weights":
        for module in list(model.modules()):
            share_products(module)
        convert_int8(model)
        layers = replaceable(model)
        while layers:  # each is freed before the next is made
            name, layer = layers.popitem()
            if not all(map(fits_fp16, matrices_of(layer))):
                continue
            if isinstance(layer, torch.nn.Linear):
                model.set_submodule(name, HalfLinear(layer.weight, layer.bias))
            elif computes_alike(half := HalfExperts(layer), layer):
                model.set_submodule(name, half)
        model.set_input_embeddings(WideEmbedding(model.get_input_embeddings()))
    embedding = model.get_input_embeddings()
    kept = {*embedding.parameters()} if isinstance(embedding, WideEmbedding) else set()
    for parameter in model.parameters():
        if parameter not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    fuse_norms(model)


@torch.inference_mode()
def convert_int8(model: Any) -> None:
    """Let FBGEMM read a model's weights in 8 bits, one layer after the other."""
    layers = {name: module for name, module in model.named_modules() if is_int8(module)}
    while layers:
        name, layer = layers.popitem()
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(name, Int8Linear(layer.weight, layer.weight_scale, layer.bias))
        else:
            model.set_submodule(name, Int8Experts(layer))


def computes_exactly(model: Any) -> bool:
    """Whether activations and sums are float32."""
    return isinstance(model.get_input_embeddings(), WideEmbedding) or model.dtype == torch.float32


def tolerance_of(model: Any) -> float:
    """By how much two right ways to compute a model's logits may differ, relatively.

    In half precision it is a few percent. Of Int8Linear's activations, which it rounds to 14 bits,
    those between two steps may be rounded to either.
    """
    if not computes_exactly(model):
        return 0.1
    by_int8 = any(isinstance(product_of(module), Int8Linear) for module in model.modules())
    return 0.01 if by_int8 else 1e-3


def product_of(module: Any) -> Any:
    """A module itself, or the product that the first of several layers computes for all."""
    if isinstance(module, Part):
        return module.shared.product if module.index == 0 else None
    return module


def held_bytes(model: Any) -> int:
    """The memory that a model's weights take in whatever form."""
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        product = product_of(module)
        if isinstance(product, HalfLinear | Int8Linear):
            each = 2 if isinstance(product, HalfLinear) else 1
            total += each * product.in_features * product.out_features
    return total


def settle_form(model: Any, dtype: str = "auto") -> str:
    """Convert a model on the CPU to its fastest form; in words, what its weights are and why.

    A dtype that was asked for is kept, and so is one that is no half precision.
    """
    kept = str(model.dtype).removeprefix("torch.")
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    asked = dtype != "auto" or model.dtype not in (torch.bfloat16, torch.float16)
    if bits := bits_of(model):
        how = settle_quantized(model, asked) if on_cpu else kernel_summary(bits, model)
        return f"in {bits} bits, {held_bytes(model) / 2**30:.1f} GiB ({how})"
    if asked or not on_cpu:
        return kept
    taken = measure_forms(model)
    form = fastest_form(taken)
    convert(model, form)
    figures = [
        f"{kept if other == 'as it is' else other} {' and '.join(f'{ms:.0f}' for ms in times)} ms"
        for other, times in taken.items()
    ]
    tokens = " and ".join(map(str, TOKENS))
    named = kept if form == "as it is" else form
    return f"{named} (products of {tokens} tokens here: {', '.join(figures)})"


def kernel_summary(bits: int, model: Any) -> str:
    """Let a card compute with the packed weights where it can; how it does, in words."""
    if bits == 4:
        return "products by bitsandbytes"
    try:
        from engine.int8_kernel import use_kernel

        use_kernel(model)
    except Exception as error:  # whatever a compiler for this card may raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        return f"unpacked before each product: {reason}"
    return "products of few tokens by a kernel of ours"


def settle_quantized(model: Any, asked: bool) -> str:
    """The same for a quantised model; how its products are computed."""
    if bits_of(model) != 8 or not has_int8_products():
        return "unpacked before each product"
    if asked:
        convert_int8(model)
    else:
        convert(model, "fp16 weights")
    return "products by FBGEMM"
