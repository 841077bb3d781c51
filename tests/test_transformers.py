# SPDX-License-Identifier: Apache-2.0
"""Within transformers' generate(): the same tokens are kept as by its own processors, and llmkern's are drawn."""

import re
import subprocess
import sys

import pytest
import torch

from llmkern.ops import sample

transformers = pytest.importorskip("transformers")

from transformers.generation import logits_process as theirs  # noqa: E402

from llmkern.transformers import (  # noqa: E402
    SWITCHED_OFF,
    LlmkernLogitsProcessor,
    LlmkernSampler,
)

pytestmark = pytest.mark.usefixtures("one_thread")
B, V = 512, 1009


def logits_without_ties(dtype, seed=0):
    """[B, V] of distinct values a row: those of a trained model in float32, and what bfloat16 has of them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        return torch.randn(B, V, generator=generator) * 2.5
    grid = torch.linspace(-9, 9, 1 << 16).to(dtype).unique()
    grid = grid[torch.randperm(len(grid), generator=generator)[:V]]
    assert len(grid) == V
    return torch.stack([grid[torch.randperm(V, generator=generator)] for _ in range(B)])


def chain(*, repetition_penalty=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """As generate() puts them together."""
    processors = theirs.LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        processors.append(theirs.TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(theirs.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(theirs.TopPLogitsWarper(top_p))
    if min_p:
        processors.append(theirs.MinPLogitsWarper(min_p))
    if typical_p < 1:
        processors.append(theirs.TypicalLogitsWarper(typical_p))
    return processors


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.02},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.5, "min_p": 0.1},
    {
        "repetition_penalty": 1.2,
        "temperature": 1.3,
        "top_k": 200,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.8,
    },
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items())
)
def test_kept_tokens_are_those_of_transformers(settings, dtype):
    """Theirs in float64: in float32 their sums of probabilities are off by more than some tokens have."""
    processor = LlmkernLogitsProcessor(**settings)
    for seed in range(4):
        logits = logits_without_ties(dtype, seed)
        input_ids = torch.randint(V, (B, 30), generator=torch.Generator().manual_seed(seed))
        got = processor(input_ids, logits)
        expected = chain(**settings)(input_ids, logits.double())
        assert got.dtype == dtype and got.shape == logits.shape
        assert torch.equal(got > -torch.inf, expected > -torch.inf)
        torch.testing.assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        in_their_order = got.gather(1, expected.argsort(dim=1, descending=True))
        assert not (in_their_order[:, 1:] > in_their_order[:, :-1]).any()


def test_top_k_keeps_k_also_where_the_kth_has_equals():
    """The one difference: transformers keeps all of them."""
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]])
    ids = torch.tensor([[0]])
    assert theirs.TopKLogitsWarper(2)(ids, logits).isfinite().tolist() == [[1, 0, 1, 1, 1]]
    assert LlmkernLogitsProcessor(top_k=2)(ids, logits).isfinite().tolist() == [[1, 0, 1, 0, 0]]


def test_penalties_see_no_padding_and_tell_prompt_from_output():
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    input_ids = torch.tensor([[5, 5, 1, 2, 2], [5, 0, 1, 3, 1]])
    processor = LlmkernLogitsProcessor(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, attention_mask=mask
    )
    got = processor(input_ids, torch.ones(2, 6))
    expected = torch.tensor([[1, 0.5, -0.5, 1, 1, 1], [0.5, -0.25, 1, -0.25, 1, 0.5]])
    assert torch.equal(got, expected)
    ignoring = theirs.RepetitionPenaltyLogitsProcessor(2.0, torch.tensor([2, 0]))
    processor = LlmkernLogitsProcessor(repetition_penalty=2.0, attention_mask=mask)
    logits = torch.randn(2, 6)
    assert torch.equal(processor(input_ids, logits), ignoring(input_ids, logits))


# ---- generate() ----

VOCABULARY, NEW = 97, 12
FILTERS = {"temperature": 1.4, "top_k": 60, "top_p": 0.95, "min_p": 0.001, "typical_p": 0.97}


def tiny(name):
    size = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **size)
        model = transformers.GPT2LMHeadModel(config)
    else:
        width = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**width, **heads, **size))
    for weight in model.parameters():
        weight.data.mul_(4)  # far from uniform
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    return tiny(request.param)


PROMPTS = {
    "input_ids": torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9], [0, 2, 6, 5]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]),
}
MASK = PROMPTS["attention_mask"]
SEEDS = [11, 12, 11]


def generate(model, processor, prompts=PROMPTS, do_sample=True, **options):
    return model.generate(
        **prompts,
        max_new_tokens=NEW,
        do_sample=do_sample,
        logits_processor=[processor],
        pad_token_id=0,
        **SWITCHED_OFF,
        **options,
    )


@pytest.mark.parametrize("do_sample", [True, False])
def test_generate_emits_the_tokens_of_sample(model, do_sample):
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    sampler = LlmkernSampler(seed=SEEDS, attention_mask=MASK, **FILTERS, **penalties)
    record = {"return_dict_in_generate": True, "output_logits": True}
    out = generate(model, sampler, do_sample=do_sample, **record)
    prompt = PROMPTS["input_ids"].where(MASK.bool(), -1)
    for step, logits in enumerate(out.logits):
        drawn = sample(
            logits,
            **FILTERS,
            **penalties,
            prompt_ids=prompt,
            output_ids=out.sequences[:, 4 : 4 + step],
            seed=torch.tensor(SEEDS),
            position=torch.tensor([4, 2, 3]) + step,
        )
        assert torch.equal(out.sequences[:, 4 + step], drawn.token)
    assert len(out.logits) == NEW and len(out.sequences[:, 4:].unique()) > NEW


def test_generate_does_not_depend_on_the_generator_or_the_batch(model):
    sampler = LlmkernSampler(seed=SEEDS, attention_mask=MASK, **FILTERS)
    expected = generate(model, sampler)
    torch.manual_seed(1234)
    assert torch.equal(generate(model, sampler), expected)
    for row, length in enumerate([4, 2, 3]):
        alone = {name: ids[row : row + 1, 4 - length :] for name, ids in PROMPTS.items()}
        sampler = LlmkernSampler(seed=SEEDS[row], **FILTERS)
        assert torch.equal(generate(model, sampler, alone)[0], expected[row, 4 - length :])


def test_rows_of_one_prompt_have_seeds_in_a_row(model):
    several = LlmkernSampler(seed=[11, 50, 90], attention_mask=MASK, **FILTERS)
    out = generate(model, several, num_return_sequences=2)
    assert out.shape == (6, 4 + NEW)
    for row, seeds in enumerate([[11, 50, 90], [12, 51, 91]]):
        one = generate(model, LlmkernSampler(seed=seeds, attention_mask=MASK, **FILTERS))
        assert torch.equal(out[row::2], one)
    whole = {"input_ids": PROMPTS["input_ids"], "attention_mask": torch.ones_like(MASK)}
    a, b = (generate(model, LlmkernSampler(seed=s), whole) for s in (7, [7, 8, 9]))
    assert torch.equal(a, b)


def test_no_seed_draws_from_torchs_generator(model):
    sampler = LlmkernSampler(seed=None)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(model, sampler))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_switched_off_leaves_nothing_of_the_models_own(model):
    """The model asks for settings of its own; with the processor alone they are applied once, by llmkern."""
    own = {**FILTERS, "repetition_penalty": 1.3}
    config = transformers.GenerationConfig(do_sample=True, **own)
    settings = {"max_new_tokens": NEW, "pad_token_id": 0}
    before = model.generation_config
    model.generation_config = config
    try:
        processor = LlmkernLogitsProcessor.from_generation_config(config, attention_mask=MASK)
        record = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        out = generate(model, processor, **record)
        for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
            assert torch.equal(scores, processor(out.sequences[:, : 4 + step], logits))
        torch.manual_seed(0)
        ours = generate(model, processor)
        torch.manual_seed(0)
        assert torch.equal(ours, model.generate(**PROMPTS, **settings))
    finally:
        model.generation_config = before


# ---- a generation_config ----


def test_settings_of_a_generation_config():
    make = LlmkernLogitsProcessor.from_generation_config
    config = transformers.GenerationConfig(temperature=0.7, min_p=0.1, no_repeat_ngram_size=2)
    got = make(config).settings
    # generate() would take the 50 most likely tokens.
    on = {"temperature": 0.7, "min_p": 0.1, "top_k": 50}
    assert got == LlmkernLogitsProcessor().settings | on
    assert make(config, top_k=0).settings["top_k"] == 0
    sampler = LlmkernSampler.from_generation_config(config, seed=3, attention_mask=MASK)
    assert sampler.settings == got and sampler.seeds.tolist() == [3]
    assert sampler.attention_mask is MASK


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"num_beams": 2}, LlmkernLogitsProcessor, "expected num_beams 1, got 2"),
        ({"top_h": 0.4}, LlmkernLogitsProcessor, "without top_h, which LlmkernLogitsProcessor"),
        ({"epsilon_cutoff": 0.1}, LlmkernLogitsProcessor, None),
        ({"epsilon_cutoff": 0.1}, LlmkernSampler, "without epsilon_cutoff, which LlmkernSampler"),
        ({"eta_cutoff": 0.1}, LlmkernSampler, "without eta_cutoff, which LlmkernSampler"),
        ({"watermarking_config": {"bias": 1.0}}, LlmkernSampler, "without watermarking_config"),
    ],
)
def test_what_does_not_fit_is_refused(settings, kind, message):
    config = transformers.GenerationConfig(do_sample=True, **settings)
    options = {"seed": 1} if kind is LlmkernSampler else {}
    if message is None:
        kind.from_generation_config(config, **options)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        kind.from_generation_config(config, **options)


def test_errors():
    with pytest.raises(ValueError, match=r"expected top_p in \(0, 1\], got 2"):
        LlmkernLogitsProcessor(top_p=2)
    with pytest.raises(ValueError, match="expected attention_mask beside presence_penalty"):
        LlmkernLogitsProcessor(presence_penalty=0.1)
    with pytest.raises(ValueError, match=r"of shape \[B, L\], got \[4\]"):
        LlmkernLogitsProcessor(attention_mask=torch.ones(4))
    for seed in (1.5, True, []):
        with pytest.raises(TypeError, match="expected seed to be an int or one for each prompt"):
            LlmkernSampler(seed=seed)
    ids, logits = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 9)
    for mask in (torch.ones(3, 2), torch.ones(4, 3)):
        with pytest.raises(ValueError, match=r"of the prompt of input_ids \[4, 2\], got shape"):
            LlmkernSampler(seed=1, attention_mask=mask)(ids, logits)
    with pytest.raises(ValueError, match="one for each prompt of B = 4 rows, got 3"):
        LlmkernSampler(seed=[1, 2, 3])(ids, logits)
    logits[2, 3] = torch.nan
    with pytest.raises(ValueError, match="a token with a probability in row 2, got NaN logits"):
        LlmkernSampler(seed=1)(ids, logits)


def test_without_transformers_the_message_says_what_to_install():
    program = """
import sys
import llmkern
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
import llmkern.transformers
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "run: pip install 'llmkern[transformers]'" in done.stderr
