"""Generates the text, trains tokenizer and model, writes the model directory and its held-out figures.

Usage: python -m deploy.train_model --out DIR [--minutes 25] [--seed 0]. Minutes are minutes of two cores, counted in
processor time, so that a busy machine gives the same model later.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # on a busy machine, waiting threads must not eat the budget

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from deploy.train_model import vocabulary
from deploy.train_model.conversation import END, END_OF_TEXT, documents
from deploy.train_model.evaluation import figures
from deploy.train_model.fitting import CORES, Outcome, Plan, fit

VOCABULARY = 1536
TOKENIZER_DOCUMENTS = 20000


def new_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3 decoder with fresh weights."""
    stops = [vocabulary.id_of(tokenizer, END), vocabulary.id_of(tokenizer, END_OF_TEXT)]
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=448,
        max_position_embeddings=vocabulary.CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=stops,
        pad_token_id=stops[1],
    )
    return Qwen3ForCausalLM(config)


def write_model(folder: Path, model: Qwen3ForCausalLM) -> None:
    """Writes weights, rounded to bfloat16, and configuration."""
    model.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = model.config
    generation = {"do_sample": False, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_report(folder: Path, plan: Plan, outcome: Outcome, parameters: int, held_out: dict[str, float]) -> None:
    """Writes what the run used and what the model can do."""
    report = {
        "seed": plan.seed,
        "budget_minutes_of_two_cores": plan.minutes,
        "wall_seconds": round(outcome.wall_s),
        "cpu_seconds": round(outcome.cpu_s),
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "parameters": parameters,
        "held_out": held_out,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
        },
    }
    (folder / "TRAINING.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m deploy.train_model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=25.0, help="budget in minutes of two cores")
    parser.add_argument("--steps", type=int, help="train for this many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Runs the whole script."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(CORES)
    torch.manual_seed(given.seed)
    plan = Plan(seed=given.seed, minutes=given.minutes, steps=given.steps)
    sample = islice(documents(Random(f"tokenizer {given.seed}"), 0.0), TOKENIZER_DOCUMENTS)
    tokenizer = vocabulary.trained(("".join(piece.text for piece in document) for document in sample), VOCABULARY)
    vocabulary.write(tokenizer, given.out)
    model = new_model(tokenizer)
    outcome = fit(model, tokenizer, plan)
    write_model(given.out, model)
    served = AutoModelForCausalLM.from_pretrained(given.out, dtype=torch.float32)
    parameters = sum(parameter.numel() for parameter in served.parameters())
    write_report(given.out, plan, outcome, parameters, figures(served, tokenizer, given.seed))


if __name__ == "__main__":
    main()
