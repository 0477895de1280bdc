"""Schemas compiled for tokenizers that write spaces in ways of their own."""

from pathlib import Path

import pytest

from engine.guided.guide import GuideCompiler
from engine.prompt.special_tokens import SpecialTokens
from engine.prompt.tokenizer_files import load_tokenizer
from tests.conftest import ROOT

TOKENIZERS = ROOT / "tests" / "fixtures" / "tokenizers"


@pytest.mark.parametrize("name", ["xverse_like", "index_like"])
def test_required_text_with_spaces_can_be_written(name):
    tokenizer = load_tokenizer(Path(TOKENIZERS / name))
    plain = SpecialTokens(tokenizer.backend_tokenizer, ()).plain
    end = len(tokenizer)
    compiler = GuideCompiler(plain, (), {tokenizer.eos_token_id or 2})
    guide = compiler.compile({"const": "a b  你好 c"})
    said = []
    while len(said) < 40:
        allowed = [int(i) for i in guide.token_mask().nonzero()[0]]
        if compiler.ends[0] in allowed:
            break
        said.append(allowed[-1])
        guide.matcher.consume_token(allowed[-1])
    assert plain.decode(said) == '"a b  你好 c"'
    assert max(said) < end
