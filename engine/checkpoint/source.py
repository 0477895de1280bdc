"""What a model is loaded from: a checkpoint's folder, or an adapter's and its base's."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig

from engine.blame import read_object
from engine.checkpoint.adapter_merge import merge_adapter
from engine.checkpoint.adapters import Adapter, is_adapter, names_of_base, read_adapter
from engine.checkpoint.formats import packed_parts, settings_of, unpacked
from engine.checkpoint.formats.gguf import GGUFFile
from engine.checkpoint.formats.gguf_config import sampling_of
from engine.checkpoint.model_config import check_architecture, load_config, plain_attention
from engine.checkpoint.packed_quantizer import PackedSettings
from engine.checkpoint.stated_numbers import check_numbers, check_size
from engine.checkpoint.stored import Stored, stored_weights
from engine.errors import StartError
from engine.prompt.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("chat")


class Source:
    """The configuration, weights and tokenizer of what is at a path.

    `plain` checks a folder, and makes one of it that transformers can read. `weights` are None
    where they are simply those of `folder`, as transformers reads them itself. Raises StartError
    for what cannot be loaded, before a weight is read.
    """

    def __init__(self, path: Path, base: Path | None, plain: Callable[[Path], Path]):
        self.path = plain(path)
        self.adapter = read_adapter(self.path) if is_adapter(self.path) else None
        self.folder = self.path
        if self.adapter:
            self.folder = plain(base or _base_of(self.adapter))
        self.gguf = GGUFFile(self.folder) if self.folder.suffix.lower() == ".gguf" else None
        self.config: Any
        self.weights: dict[str, Stored] | None = None
        self.packed: dict[str, dict[str, Stored]] = {}  # of them, what can stay in its own bits
        if self.gguf:
            self.config, self.weights = self.gguf.config(), self.gguf.weights()
            self.packed = self.gguf.packed()
            self.config.dtype = self.gguf.dtype()
            check_numbers(self.config)
            check_architecture(self.config)
        else:
            self._open_folder()
        if self.adapter and self.weights is not None:
            log.info("merging its adapter into the model in %s", self.folder)
            self.packed = {}
            self.weights = merge_adapter(self.weights, self.adapter, self.config)

    def _open_folder(self) -> None:
        self.config = load_config(self.folder)
        check_size(self.config, self.folder)
        settings = settings_of(self.config, self.folder)
        # Beside a merged model its adapter may lie, which transformers would add again by peft.
        if settings or self.adapter or (self.folder / "adapter_config.json").is_file():
            self.weights = stored_weights(self.folder)
        if settings and self.weights is not None:
            self.packed = packed_parts(self.weights, settings)
            self.weights = unpacked(self.weights, settings)
            for name in ("quantization_config", "compression_config"):
                if hasattr(self.config, name):
                    delattr(self.config, name)

    def keep_packed(self) -> PackedSettings:
        """Settings with which `read` leaves what can be in the checkpoint's own bits."""
        assert self.weights is not None
        inputs = next((x for x in self.packed if x.endswith("embed_tokens")), None)
        if inputs and self.config.tie_word_embeddings:
            # One matrix in two forms: rows for the embedding, panels for the head.
            self.config.tie_word_embeddings = False
            self.weights["lm_head.weight"] = self.weights[f"{inputs}.weight"]
            self.packed["lm_head"] = self.packed[inputs]
        return PackedSettings(self.weights, self.packed)

    def read(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The model, and what of its tensors was not there or of another shape."""
        options |= {
            "config": self.config,
            # InternLM2's config asks for eager attention, which is slow.
            "attn_implementation": plain_attention(self.config),
            "trust_remote_code": False,
            "local_files_only": True,
            # Missing or mismatched tensors would otherwise be random, with only a line in the log.
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        if self.weights is None:
            return AutoModelForCausalLM.from_pretrained(self.folder, **options)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        # By no name: with one, and peft installed, transformers would add the adapter again.
        model, report = kind.from_pretrained(
            None, state_dict=self.weights, generation_config=self.generation_config(), **options
        )
        factors = self.gguf.frequency_factors() if self.gguf else None
        if factors is not None:
            rope = model.model.rotary_emb
            rope.inv_freq /= factors.to(rope.inv_freq)
            rope.original_inv_freq = rope.inv_freq.clone()
        return model, report

    def generation_config(self) -> GenerationConfig:
        """The adapter's own, or else its base's; a GGUF file's lies beside it, or is in it."""
        plain = GenerationConfig.from_model_config(self.config)
        for path in (self.path, self.folder):
            file = (path.parent if path.is_file() else path) / "generation_config.json"
            if file.is_file():
                found = GenerationConfig.from_dict(read_object(file))
                if found.eos_token_id is None:
                    found.eos_token_id = plain.eos_token_id
                return found
        if self.gguf:
            plain.update(**sampling_of(self.gguf.said))
        return plain

    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """The adapter's own goes before its base's, than which it may have more tokens.

        Raises StartError where it has more than the model.
        """
        tokenizer = None if self.gguf and self.path == self.folder else load_tokenizer(self.path)
        if tokenizer is None or self.folder == self.path:
            return tokenizer or self._tokenizer_of_base()
        rows = self.config.get_text_config().vocab_size
        if len(tokenizer) > rows:
            raise StartError(
                f"the tokenizer in {self.path} has {len(tokenizer)} tokens, and the model {rows}:"
                " the adapter was saved without the embedding that it was trained with; save it"
                " with save_embedding_layers=True"
            )
        if tokenizer.chat_template is None and (own := self._tokenizer_of_base()):
            tokenizer.chat_template = own.chat_template
        return tokenizer

    def _tokenizer_of_base(self) -> "PreTrainedTokenizerFast | None":
        return self.gguf.tokenizer() if self.gguf else load_tokenizer(self.folder)


def _base_of(adapter: Adapter) -> Path:
    """The folder of the model that an adapter names. Raises StartError where it is not here."""
    for name in names_of_base(adapter):
        if (Path(name).expanduser() / "config.json").is_file():
            return Path(name).expanduser()
    named = adapter.settings.get("base_model_name_or_path")
    raise StartError(
        f"the adapter in {adapter.folder} belongs to {named or 'a model that it does not name'},"
        " which is not here; give its folder with --base"
    )
