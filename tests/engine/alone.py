"""What a family's tiny model says of a prompt by itself."""

import importlib.util
from functools import cache

import pytest
import torch

from engine.checkpoint.checkpoint import load_model
from engine.checkpoint.model_config import context_length
from engine.kernels.cpu import why_missing
from engine.layers.weight_format import WeightFormat, convert
from engine.runner.create import create_runner
from engine.runner.self_check import probes, reference_logits
from tests.conftest import ROOT, greedy
from tests.engine.stand_ins import as_on_a_card

FIXTURES = ROOT / "tests" / "fixtures"


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
needs_kernels = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
FAMILIES = ["deepseek_v2", "index", "internlm2", "internlm2_ntk", "llama", "xverse"]


class Alone:
    """A family's tiny model: what `generate` says of a prompt by itself, and a runner."""

    def __init__(self, name: str, form: WeightFormat, quantize: str):
        dtype = "float32" if form == "as it is" else "bfloat16"
        model, _ = load_model(FIXTURES / name, dtype=dtype, quantize=quantize)
        convert(model, form)
        self.context = min(context_length(model.config), 200)
        self.plain = [reference_logits(model, ids) for ids in probes(model)]
        generator = torch.Generator().manual_seed(1)
        lengths = [n for n in (1, 2, 3, 9, 17, 31, 64, 130) if n + 3 < self.context]
        self.prompts = [torch.randint(5, 290, (n,), generator=generator).tolist() for n in lengths]
        # Some begin alike, as a conversation's turns do.
        long = max(self.prompts, key=len)
        half = len(long) // 2
        self.prompts += [long[:half], [*long[:half], 9, 8, 7], [*long[: half + 3], 6, 5]]
        self.answers = [self._greedy(model, prompt) for prompt in self.prompts]
        turn = self.answers[-3][:6]
        self.prompts.append([*long[:half], *turn, 4, 3])
        self.answers.append(self._greedy(model, self.prompts[-1]))
        self.runner = create_runner(model, "1GiB", max_rows=600)
        # What CUDA cards do, by the letter of what torch says of its own parts.
        with pytest.MonkeyPatch.context() as patch:
            as_on_a_card(patch)
            self.on_cards = create_runner(model, "1GiB", max_rows=600)

    def _greedy(self, model, prompt: list[int]) -> list[int]:
        return greedy(model, prompt, min(24, self.context - len(prompt)))


@cache
def alone(name: str, form: WeightFormat = "as it is", quantize: str = "none") -> Alone:
    return Alone(name, form, quantize)
