"""Make a small Llama with RANDOM weights: the demo's and the tests' model, there in seconds and without a download.

It has learned nothing and writes gibberish. It is a Llama in every other respect, so that an engine treats it as one:
grouped-query attention, rotary positions, a byte-level BPE tokenizer with a chat template, safetensors. The same shape
and seed give the same bytes.

Runs where transformers, tokenizers and torch are (the engine image): `python make_model.py FOLDER`. Importing this
module needs none of them.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}"
)
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Beginning and end of a text first; their ids are 0 and 1."""

README = """\
# A tiny Llama with random weights

Made by kvplane's `make_model.py` for demos and tests. It has learned nothing: its output is gibberish by design.
"""


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama. The default is small enough for a laptop's CPU and has no degenerate dimension."""

    layers: int = 4
    hidden: int = 256
    intermediate: int = 704
    heads: int = 8
    kv_heads: int = 4
    """Fewer than `heads`: queries share keys and values in groups, as in every recent Llama."""
    vocabulary: int = 8192
    positions: int = 4096

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}.")
        if self.vocabulary < 256 + len(SPECIAL_TOKENS):
            least = 256 + len(SPECIAL_TOKENS)
            raise ValueError(f"vocabulary must hold every byte and the special tokens, {least}, got {self.vocabulary}.")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of weights; embedding and output projection are not tied."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of KV cache that one token takes: keys and values of every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


def training_text() -> Iterator[str]:
    """Text for the tokenizer: all two- and three-syllable words over a small sound inventory, in a fixed order.

    Enough distinct words (more than 60,000) for BPE to find merges for any vocabulary up to about 10,000 tokens.
    """
    onsets = ("b", "c", "d", "f", "g", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "pl", "sh", "th")
    rhymes = ("a", "e", "i", "o", "u", "an", "er", "in", "on", "al", "est")
    syllables = [onset + rhyme for onset in onsets for rhyme in rhymes]
    for i, first in enumerate(syllables):
        yield " ".join(first + second for second in syllables)
        yield " ".join(first + second + syllables[(i + 7 * j) % len(syllables)] for j, second in enumerate(syllables))
    yield (
        "The quick brown fox jumps over the lazy dog. A key-value cache holds what attention has already computed; "
        "when it is full, requests are preempted and their work is done again. Hello, world! 0123456789 {}[]()<>=+-*/"
    )


def make_model(folder: Path, *, shape: Shape | None = None, seed: int = 0) -> None:
    """Write config, weights (float32 safetensors), tokenizer and chat template into `folder`; about 5 s."""
    # Here and not above: the module's arithmetic is tested where these large packages are absent.
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    shape = shape or Shape()
    folder.mkdir(parents=True, exist_ok=True)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != shape.vocabulary:
        raise ValueError(
            f"vocabulary must be at most {tokenizer.get_vocab_size()} for this text, got {shape.vocabulary}."
        )
    begin, end = SPECIAL_TOKENS[:2]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=shape.positions,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = transformers.LlamaForCausalLM(config)
    if model.num_parameters() != shape.parameters:
        raise ValueError(f"expected {shape.parameters} weights, transformers made {model.num_parameters()}.")
    model.save_pretrained(folder)
    (folder / "README.md").write_text(README)
    for file in folder.iterdir():
        file.chmod(0o644)  # save_pretrained leaves the weights to their owner, engines run as someone else


def main() -> None:
    """Command line: the folder, and the dimensions that tests like to change."""
    parser = argparse.ArgumentParser(description="Make a small Llama with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--positions", type=int, default=Shape.positions, help="longest text in tokens")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_model(
        arguments.folder,
        shape=Shape(layers=arguments.layers, positions=arguments.positions),
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
