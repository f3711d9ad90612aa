"""Tiny tokenizers of every kind in use, each trained here on sentences about places and cities."""

from collections.abc import Callable
from functools import cache, partial

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.oracles.tiny import sentences

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PROMPTS = (
    "The capital of France is",
    "Q: What is the capital city of Peru? A:",
    "The city of Spain is ",
    "It said '",
)
ANSWERS = (
    *("Lima", "the United Kingdom", "Santiago", " Paris", "N'Lima-Oslo", "Oslo qux", "Rome  Bern"),
    *("東京", "é"),
)
_BYTE = {char: bytes([byte]) for byte, char in bytes_to_unicode().items()}


def _around(tokenizer: Tokenizer, template: str, *special: str) -> None:
    pairs = [(token, tokenizer.token_to_id(token)) for token in special]
    around = processors.TemplateProcessing(single=template, special_tokens=pairs)
    old = tokenizer.post_processor
    tokenizer.post_processor = around if old is None else processors.Sequence([old, around])


def byte_level(*, prefix: bool, trim: bool, template: str = "") -> Tokenizer:
    """GPT-2's kind; Llama 3 has a BOS, OPT a BOS, RoBERTa both and trimmed offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    if template:
        _around(tokenizer, template, BOS, EOS)
    return tokenizer


def metaspace_bpe(
    *, normaliser: bool, prepend: bool = True, template: str = f"{BOS} $A"
) -> Tokenizer:
    """SentencePiece's BPE with byte fallback.

    Spaces are made by a normaliser (Llama 2, Gemma) or by a pre-tokenizer (Mistral).
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    if normaliser:
        steps = [normalizers.Prepend("▁")] if prepend else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        training = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        training = pre_tokenizers.Metaspace(prepend_scheme="first" if prepend else "never")
    tokenizer.pre_tokenizer = training
    special = [UNK, BOS, EOS, PAD, *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    if normaliser:
        tokenizer.pre_tokenizer = None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    _around(tokenizer, template, BOS, EOS)
    return tokenizer


def unigram() -> Tokenizer:
    """T5's kind: SentencePiece's unigram model with an end-of-text token behind every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": [PAD, EOS, UNK, BOS], "unk_token": UNK, "show_progress": False}
    tokenizer.train_from_iterator(sentences(), trainers.UnigramTrainer(vocab_size=120, **options))
    _around(tokenizer, f"$A {EOS}", EOS)
    return tokenizer


def word_piece(*, lower: bool) -> Tokenizer:
    """BERT's kind, between [CLS] and [SEP]; the latter stands for the end of text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    options = {"special_tokens": [PAD, UNK, BOS, EOS], "show_progress": False}
    tokenizer.train_from_iterator(sentences(), trainers.WordPieceTrainer(vocab_size=150, **options))
    _around(tokenizer, f"{BOS} $A {EOS}", BOS, EOS)
    return tokenizer


BOTH = f"{BOS} $A {EOS}"
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": partial(byte_level, prefix=False, trim=False),
    "byte-level, BOS": partial(byte_level, prefix=False, trim=True, template=f"{BOS} $A"),
    "byte-level, prefix space": partial(byte_level, prefix=True, trim=False),
    "byte-level, prefix space, BOS": partial(
        byte_level, prefix=True, trim=True, template=f"{BOS} $A"
    ),
    "byte-level, BOS and EOS": partial(byte_level, prefix=False, trim=True, template=BOTH),
    "metaspace, normaliser, BOS": partial(metaspace_bpe, normaliser=True),
    "metaspace, normaliser, no prefix, BOS": partial(metaspace_bpe, normaliser=True, prepend=False),
    "metaspace, pre-tokenizer, BOS": partial(metaspace_bpe, normaliser=False),
    "metaspace, pre-tokenizer, no prefix": partial(
        metaspace_bpe, normaliser=False, prepend=False, template="$A"
    ),
    "unigram, EOS": unigram,
    "WordPiece, lower case": partial(word_piece, lower=True),
    "WordPiece": partial(word_piece, lower=False),
}


def spelling(kind: str, token: str) -> bytes:
    """The bytes that a token stands for; for WordPiece without white space and in lower case."""
    if kind.startswith("byte-level"):
        return b"".join(_BYTE[char] for char in token)
    if token in BYTES:
        return bytes([int(token[3:5], 16)])
    if kind.startswith("WordPiece"):
        return token.removeprefix("##").lower().encode()
    return token.replace("▁", " ").encode()


@cache
def _serialised(kind: str) -> str:
    return KINDS[kind]().to_str()


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of one of `KINDS`."""
    backend = Tokenizer.from_str(_serialised(kind))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK
    )
