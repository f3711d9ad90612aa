"""Claims about decoding and fingerprints."""

import hashlib

import pytest
import torch

from mendkit.errors import DataError, HyperParamError
from mendkit.models.base import BaseModel
from mendkit.models.fingerprint import model_fingerprint
from mendkit.models.load import load_model
from tests.oracles.tiny import POSITIONS, save_tiny, sentences, tiny_llama

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
PROMPTS = tuple(s[: 8 + 3 * i] for i, s in enumerate(sentences()[::37]))


def naive_greedy(base: BaseModel, ids: list[int], steps: int) -> list[int]:
    """One token after another by a full forward without cache."""
    new: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            new.append(int(base.model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == base.eos_id:
            return new[:-1]
    return new


@FAMILIES
def test_decoding_is_greedy(family, request):
    base = request.getfixturevalue(family)
    for prompt in PROMPTS[:4]:
        ids = base.tokenizer(prompt)["input_ids"]
        got = base.write([base.tokenize(prompt)], max_new_tokens=12, stop=False)
        assert got == [naive_greedy(base, ids, 12)]


@FAMILIES
@pytest.mark.parametrize("stop", [True, False])
def test_batched_and_single_generation_agree(family, stop, request):
    base = request.getfixturevalue(family)
    singles = [base.generate(prompt, max_new_tokens=16, stop=stop) for prompt in PROMPTS]
    assert base.generate_batch(PROMPTS, max_new_tokens=16, stop=stop) == singles
    assert base.generate_batch(PROMPTS, max_new_tokens=16, stop=stop, batch_size=3) == singles
    assert len(set(singles)) > 3 and base.generate_batch([]) == []


@FAMILIES
def test_rows_keep_their_order_and_stop_by_themselves(family, request):
    """Oracle: the rows that nothing stopped, cut by hand. Full stops and newlines are made likely for it."""
    base = request.getfixturevalue(family)
    rows = [base.tokenize(prompt) for prompt in PROMPTS]
    stops = [token for end in ".\n" for token in base.tokenizer(end)["input_ids"]]
    bonus = torch.zeros(len(base.tokenizer))
    bonus[stops] = 1.0
    head = base.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, logits: logits + bonus)
    try:
        free = base.write(rows, max_new_tokens=24, stop=False)
        stopped = base.write(rows, max_new_tokens=24, stop=True)
        singles = [base.generate(prompt, max_new_tokens=24) for prompt in PROMPTS]
        together = base.generate_batch(PROMPTS, max_new_tokens=24)
    finally:
        handle.remove()
    by_hand = []
    for row in free:
        ends = [
            i for i, token in enumerate(row) if set(base.tokenizer.decode([token])) & set(".\n")
        ]
        by_hand.append(row[: ends[0] + 1] if ends else row)
    assert stopped == by_hand
    assert len({len(row) for row in stopped}) > 2
    written = [base.tokenizer.decode(row, skip_special_tokens=True) for row in by_hand]
    texts = [text.split("\n")[0].split(".")[0] for text in written]
    assert singles == together == texts
    assert [base.new_text(ids, row) for ids, row in zip(rows, stopped, strict=True)] == texts


def test_the_checkpoints_generation_settings_have_no_say():
    base, plain = tiny_llama(), tiny_llama()
    settings = base.model.generation_config
    settings.repetition_penalty, settings.num_beams, settings.do_sample, settings.max_length = (
        5.0,
        3,
        True,
        3,
    )
    settings.temperature, settings.no_repeat_ngram_size = 9.0, 1
    assert base.generate_batch(PROMPTS, stop=False) == plain.generate_batch(PROMPTS, stop=False)
    assert base.model.generation_config is settings


def test_every_declared_end_of_text_ends_a_row():
    base = tiny_llama()
    prompt = [base.tokenize(PROMPTS[0])]
    row = base.write(prompt, max_new_tokens=8, stop=False)[0]
    base.model.generation_config.eos_token_id = [base.eos_id, row[2], 10**6]
    cut = base.write(prompt, max_new_tokens=8, stop=False)[0]
    assert cut == row[: row.index(row[2])]


def test_new_text_keeps_the_leading_space_and_drops_special_tokens(llama):
    prompt = llama.tokenizer("The capital of France is")["input_ids"]
    new = [*llama.tokenizer(" Paris")["input_ids"], llama.eos_id]
    assert llama.new_text(prompt, new) == llama.new_text([], new) == " Paris"
    assert llama.new_text(prompt, llama.tokenizer(" a.b\nc")["input_ids"]) == " a"
    assert llama.new_text(prompt, llama.tokenizer(" a.b\nc")["input_ids"], stop=False) == " a.b\nc"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda b: b.generate(""), DataError, "without tokens"),
        (lambda b: b.generate("a", max_new_tokens=0), HyperParamError, "at least 1, got 0"),
        (lambda b: b.generate("Paris" * 200), DataError, f"{POSITIONS} positions"),
        (lambda b: b.generate_batch("Paris"), HyperParamError, "list of prompts"),
        (lambda b: b.generate_batch(["a"], batch_size=0), HyperParamError, "batch_size >= 1"),
    ],
)
def test_misuse_of_generation_is_explained(llama, call, error, words):
    with pytest.raises(error, match=words):
        call(llama)


def test_the_fingerprint_tells_sites_trunk_and_tokenizer_apart(tmp_path):
    base = tiny_llama()
    before = model_fingerprint(base)
    assert before == model_fingerprint(load_model(save_tiny(tmp_path / "tiny-llama", base)))
    base.tokenizer(
        ["a", "b c d"], padding=True, truncation=True, max_length=2
    )  # leaves its mark in the backend
    assert model_fingerprint(base) == before == model_fingerprint(tiny_llama())
    with torch.no_grad():
        base.model.model.norm.weight[0] += 1
    trunk = model_fingerprint(base)
    assert {key for key in before if before[key] != trunk[key]} == {"trunk_sha256"}
    with torch.no_grad():
        base.site_module(base.sites[0]).weight[0, 0] += 1
    sites = model_fingerprint(base)
    assert {key for key in trunk if trunk[key] != sites[key]} == {"sites_sha256"}
    other = model_fingerprint(base.with_sites([base.sites[0].name]))
    assert {"sites", "sites_sha256", "trunk_sha256"} == {
        key for key in sites if sites[key] != other[key]
    }
    assert other["sites"] == [{"name": base.sites[0].name, "shape": [64, 32]}]


def test_the_hash_of_the_sites_is_over_float32_bytes():
    base = tiny_llama().with_sites(["model.layers.3.mlp.up_proj.weight"])
    weight = base.site_module(base.sites[0]).weight
    by_hand = hashlib.sha256(
        b"model.layers.3.mlp.up_proj.weight torch.float32 (64, 32)\n" + weight.numpy().tobytes()
    )
    assert model_fingerprint(base)["sites_sha256"] == by_hand.hexdigest()
    base.model.to(torch.float64)
    assert model_fingerprint(base)["sites_sha256"] == by_hand.hexdigest()


def test_bfloat16_has_a_fingerprint(llama_bf16):
    assert len(model_fingerprint(llama_bf16)["trunk_sha256"]) == 64
