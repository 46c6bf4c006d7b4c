"""Greedy output and logprobs against transformers, through the real scheduler, pool, cache and runner."""

import itertools

import pytest
from fakes.exactness import CheckpointSpec, covering_specs, expert_specs, family_specs, mixed_prompts
from fakes.in_ci import every
from fakes.in_process import InProcessWorker, load_runner
from fakes.latent_specs import latent_specs

from penstock.workers.forward_pass import kv_view
from penstock.workers.protocol import EndReason, GenerateRequest, SamplingParams
from penstock.workers.settings import SchedulerSettings

SPECS = covering_specs()
CHUNKS = (16, 64, 8192)  # tokens per step; the last never cuts a prompt
VARIANTS = list(itertools.product(CHUNKS, (True, False), (False, True)))
LLAMA, QWEN = SPECS[0], SPECS[6]
FAMILIES = family_specs() + expert_specs() + latent_specs()
ONE_OF_EACH = family_specs()[::3] + expert_specs()[::2] + latent_specs()[1:3]
SHORT, LONG = (16, True, True), (64, False, False)


def _name(value):
    if isinstance(value, CheckpointSpec):
        return value.name
    chunk, caching, preempt = value
    return f"chunk{chunk}" + "-cache" * caching + "-preempt" * preempt


def worker(model, chunk=512, prefix_caching=True, preempt=False, **options):
    """`preempt`: a pool so small, with nothing reserved for growth, that running sequences must give way."""
    settings = SchedulerSettings(
        max_model_len=512,
        max_num_batched_tokens=chunk,
        max_num_seqs=min(chunk, 64),
        reserve_tokens=0 if preempt else 256,
        watermark=0.0 if preempt else 0.01,
    )
    blocks = 24 if preempt else 1024
    return InProcessWorker(
        model.runner, num_blocks=blocks, prefix_caching=prefix_caching, scheduler=settings, **options
    )


def require_exact(model, chunk, prefix_caching, preempt, count, prompts=64):
    prompts = mixed_prompts(model.spec.vocab, prompts)
    with worker(model, chunk, prefix_caching, preempt) as running:
        outputs = [output.tokens for output in running.greedy(prompts, count)]
        assert all(len(output) == count for output in outputs)
        if preempt:
            assert running.preemptions > 0
        if prefix_caching:
            assert [output.tokens for output in running.greedy(prompts, count)] == outputs
            assert running.cached_tokens > 0
    model.reference.judge(prompts, outputs).require_exact()
    return prompts, outputs


@pytest.mark.parametrize(("spec", "variant"), every(6, zip(SPECS, VARIANTS, strict=True)), ids=_name)
def test_every_model_in_one_variant(load_model, spec, variant):
    model = load_model(spec)
    prompts, outputs = require_exact(model, *variant, count=20)
    for number in (3, 40):
        assert model.reference.generate(prompts[number], 20) == outputs[number]


@pytest.mark.parametrize("spec", every(6, ONE_OF_EACH), ids=lambda spec: spec.name)
def test_newer_families_in_small_chunks_with_preemption(load_model, spec):
    model = load_model(spec)
    prompts, outputs = require_exact(model, *SHORT, count=20, prompts=24)
    assert model.reference.generate(prompts[20], 20) == outputs[20]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=_name)
@pytest.mark.parametrize("spec", SPECS + FAMILIES, ids=lambda spec: spec.name)
def test_every_model_in_every_variant(load_model, spec, variant):
    require_exact(load_model(spec), *variant, count=32)


@pytest.mark.parametrize("spec", every(6, SPECS + FAMILIES), ids=lambda spec: spec.name)
def test_outputs_are_diverse(load_model, spec):
    model = load_model(spec)
    prompt = mixed_prompts(spec.vocab)[5]
    with worker(model) as running:
        (output,) = running.greedy([prompt], 128)
    assert len(set(output.tokens)) >= 64


@pytest.mark.parametrize("spec", every(6, SPECS + ONE_OF_EACH), ids=lambda spec: spec.name)
def test_corrupting_any_one_block_changes_the_output(load_model, spec):
    """But for a block outside every layer's window: that one must not matter at all."""
    model, prompt = load_model(spec), mixed_prompts(spec.vocab, longest=150)[20]
    windows = model.runner._decoder.config.windows
    reach = len(prompt) if 0 in windows else max(windows) - 1  # of the first token that is computed from the cache
    clean = _with_corruption(model, prompt, None)
    for block in range(-(-len(prompt) // 16)):
        matters = 16 * (block + 1) > len(prompt) - reach
        assert (_with_corruption(model, prompt, block) != clean) == matters, f"block {block} of {len(prompt)} tokens"


def _with_corruption(model, prompt, victim):
    """48 tokens, with the values (or latent rows) of context block `victim` negated after the prefill."""

    def corrupt(plan):
        if victim is not None and plan.num_decode and plan.starts[0] == len(prompt):
            kv_view(running.storage.data, model.runner.layout)[int(plan.block_tables[0, victim]), :, -1].neg_()

    with worker(model, on_plan=corrupt) as running:
        return running.greedy([prompt], 48)[0].tokens


@pytest.mark.parametrize("spec", [LLAMA, QWEN], ids=lambda spec: spec.name)
def test_a_wrong_token_is_found(load_model, spec):
    model, prompts = load_model(spec), mixed_prompts(spec.vocab, 4)
    with worker(model) as running:
        outputs = [output.tokens for output in running.greedy(prompts, 8)]
    outputs[2][5] = (outputs[2][5] + 1) % spec.vocab
    verdict = model.reference.judge(prompts, outputs)
    assert (2, 5) in [found[:2] for found in verdict.wrong]
    with pytest.raises(AssertionError, match="steps differ"):
        verdict.require_exact()


@pytest.mark.parametrize("spec", [LLAMA, QWEN], ids=lambda spec: spec.name)
def test_logprobs(load_model, spec):
    model, prompts = load_model(spec), mixed_prompts(spec.vocab, 12)
    with worker(model, chunk=64) as running:
        outputs = running.greedy(prompts, 10, logprobs=5)
    expected = model.reference.logprobs(prompts, [output.tokens for output in outputs])
    for output, truth in zip(outputs, expected, strict=True):
        assert len(output.logprobs) == 10
        for step, (token, (chosen, top)) in enumerate(zip(output.tokens, output.logprobs, strict=True)):
            assert chosen == pytest.approx(float(truth[step, token]), abs=1e-4)
            assert len(top) == 5
            assert [value for _, value in top] == pytest.approx(truth[step].topk(5).values.tolist(), abs=1e-4)
            for other, value in top:
                assert value == pytest.approx(float(truth[step, other]), abs=1e-4)


@pytest.mark.parametrize("spec", [LLAMA, QWEN], ids=lambda spec: spec.name)
def test_seeded_sampling_is_the_same_alone_in_a_batch_and_in_chunks(load_model, spec):
    model, prompts = load_model(spec), mixed_prompts(spec.vocab, 32, longest=60)
    kinds = [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02, "top_k": 200, "top_p": 0.95}]
    requests = [
        GenerateRequest(f"r{i}", prompt, SamplingParams(24, temperature=0.8, seed=1000 + i, **kinds[i % 4]))
        for i, prompt in enumerate(prompts)
    ]
    with worker(model) as running:
        together = [output.tokens for output in running.generate(requests)]
    with worker(model, chunk=16, prefix_caching=False, preempt=True) as running:
        assert [output.tokens for output in running.generate(requests)] == together
    with worker(model) as running:
        for number in range(8):
            assert running.generate([requests[number]])[0].tokens == together[number]
    assert len({tuple(tokens) for tokens in together}) == len(together)


def test_choices_of_one_request_differ(load_model):
    model = load_model(LLAMA)
    prompt = mixed_prompts(LLAMA.vocab)[10]
    requests = [
        GenerateRequest(f"r{choice}", prompt, SamplingParams(16, temperature=1.0, seed=7, choice=choice))
        for choice in range(4)
    ]
    with worker(model) as running:
        outputs = [tuple(output.tokens) for output in running.generate(requests)]
    assert len(set(outputs)) == 4


def test_going_on_from_emitted_tokens_gives_the_same_text(load_model):
    model, prompts = load_model(QWEN), mixed_prompts(QWEN.vocab, 6)
    params = [SamplingParams(20, temperature=t, seed=5) for t in (0.0, 0.9, 0.0, 0.9, 0.0, 0.9)]
    whole = [GenerateRequest(f"r{i}", p, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
    with worker(model) as running:
        outputs = [output.tokens for output in running.generate(whole)]
    with worker(model) as running:
        for request, output in zip(whole, outputs, strict=True):
            resumed = GenerateRequest("again", request.prompt, request.sampling, emitted=tuple(output[:7]))
            assert running.generate([resumed])[0].tokens == output[7:]


def test_stop_tokens_end_a_choice(load_model):
    model, prompt = load_model(LLAMA), mixed_prompts(LLAMA.vocab)[4]
    with worker(model) as running:
        free = running.greedy([prompt], 12)[0].tokens
        params = SamplingParams(12, stop_token_ids=(free[5],))
        (stopped,) = running.generate([GenerateRequest("stop", prompt, params)])
    assert stopped.tokens == free[: free.index(free[5]) + 1]
    assert stopped.end is EndReason.STOP


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("spec", [LLAMA, QWEN], ids=lambda spec: spec.name)
def test_narrow_dtypes_stay_close(load_model, spec, dtype):
    """Rounding moves near-ties, no more: the chosen token's true logprob is close to the best one's."""
    model = load_model(CheckpointSpec(spec.family, spec.heads, spec.kv_heads, spec.head_dim, std=0.04))
    prompts = mixed_prompts(spec.vocab, 8)
    narrow = load_runner(model.directory, dtype=dtype, max_model_len=512)
    settings = SchedulerSettings(max_model_len=512, max_num_batched_tokens=64)
    with InProcessWorker(narrow, scheduler=settings) as running:
        outputs = [output.tokens for output in running.greedy(prompts, 12)]
    for output, truth in zip(outputs, model.reference.logprobs(prompts, outputs), strict=True):
        chosen = truth[range(12), output]
        assert (truth.max(dim=-1).values - chosen).max() < 0.1
