"""Tiny tokenizers of every kind in use, each trained here on sentences about places and cities."""

from collections.abc import Callable
from functools import cache

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

from tests.oracles.tiny import sentences

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer


def _around(tokenizer: Tokenizer, template: str, *special: str) -> None:
    pairs = [(token, tokenizer.token_to_id(token)) for token in special]
    around = processors.TemplateProcessing(single=template, special_tokens=pairs)
    old = tokenizer.post_processor
    tokenizer.post_processor = around if old is None else processors.Sequence([old, around])


def byte_level(*, prefix: bool, trim: bool, template: str = "") -> Tokenizer:
    """GPT-2's kind; Llama 3 has a BOS, OPT a BOS, RoBERTa both and trimmed offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder, tokenizer.post_processor = (
        decoders.ByteLevel(),
        processors.ByteLevel(trim_offsets=trim),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [BOS, EOS, PAD]
    _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if template:
        _around(tokenizer, template, BOS, EOS)
    return tokenizer


def metaspace_bpe(
    *, normaliser: bool, prepend: bool = True, template: str = f"{BOS} $A"
) -> Tokenizer:
    """SentencePiece's BPE with byte fallback: spaces by a normaliser (Llama 2, Gemma) or a pre-tokenizer (Mistral)."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
    if normaliser:
        steps = [normalizers.Prepend("▁")] if prepend else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        training = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        training = pre_tokenizers.Metaspace(prepend_scheme="first" if prepend else "never")
    tokenizer.pre_tokenizer = training
    special = [UNK, BOS, EOS, PAD, *BYTES]
    _train(
        tokenizer, trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False)
    )
    if normaliser:
        tokenizer.pre_tokenizer = None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, *([decoders.Strip(" ", 1, 0)] if prepend else [])]
    )
    _around(tokenizer, template, BOS, EOS)
    return tokenizer


def unigram() -> Tokenizer:
    """T5's kind: SentencePiece's unigram model with an end-of-text token behind every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = [PAD, EOS, UNK, BOS]
    _train(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token=UNK, show_progress=False
        ),
    )
    _around(tokenizer, f"$A {EOS}", EOS)
    return tokenizer


def word_piece(*, lower: bool) -> Tokenizer:
    """BERT's kind, between [CLS] and [SEP]; the latter stands for the end of text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    _train(
        tokenizer,
        trainers.WordPieceTrainer(
            vocab_size=150, special_tokens=[PAD, UNK, BOS, EOS], show_progress=False
        ),
    )
    _around(tokenizer, f"{BOS} $A {EOS}", BOS, EOS)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(prefix=False, trim=False),
    "byte-level, BOS": lambda: byte_level(prefix=False, trim=True, template=f"{BOS} $A"),
    "byte-level, prefix space": lambda: byte_level(prefix=True, trim=False),
    "byte-level, prefix space, BOS": lambda: byte_level(
        prefix=True, trim=True, template=f"{BOS} $A"
    ),
    "byte-level, BOS and EOS": lambda: byte_level(
        prefix=False, trim=True, template=f"{BOS} $A {EOS}"
    ),
    "metaspace, normaliser, BOS": lambda: metaspace_bpe(normaliser=True),
    "metaspace, normaliser, no prefix, BOS": lambda: metaspace_bpe(normaliser=True, prepend=False),
    "metaspace, pre-tokenizer, BOS": lambda: metaspace_bpe(normaliser=False),
    "metaspace, pre-tokenizer, no prefix": lambda: metaspace_bpe(
        normaliser=False, prepend=False, template="$A"
    ),
    "unigram, EOS": unigram,
    "WordPiece, lower case": lambda: word_piece(lower=True),
    "WordPiece": lambda: word_piece(lower=False),
}


@cache
def _serialised(kind: str) -> str:
    return KINDS[kind]().to_str()


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of one of `KINDS`."""
    backend = Tokenizer.from_str(_serialised(kind))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK
    )
