"""vLLM's offline engine on command: run by beside_vllm.py with the Python of vLLM's own environment.

Reads lines `batch` or `single` and answers each with one JSON line {"tok_s": ...}; prefix caching off, end-of-sequence
ignored, greedy, no detokenising: what offline.py measures of Penstock.
"""

import argparse
import json
import os
import random
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--input", type=int, required=True)
    parser.add_argument("--output", type=int, required=True)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to standard output too
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        model=args.model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=args.input + args.output + 16,
        enforce_eager=args.eager,
        enable_prefix_caching=False,
    )
    started = time.perf_counter() - begin
    with open(os.path.join(args.model, "config.json"), encoding="utf-8") as file:
        vocabulary = json.load(file)["vocab_size"]
    sampling = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True, detokenize=False)
    rng = random.Random(0)

    def rate(count: int) -> float:
        prompts = [{"prompt_token_ids": [rng.randrange(vocabulary) for _ in range(args.input)]} for _ in range(count)]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - begin)

    rate(args.requests)
    print(json.dumps({"start_s": round(started, 1)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"tok_s": rate(args.requests if line.strip() == "batch" else 1)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
