"""A model directory without sense but with everything the front reads: config, tokenizer, template, an empty shard."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call>{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, how are you today?", "12+34=46 naïve café ☕"]
CONTEXT = 512


def write_tiny_model(directory: Path, *, context: int = CONTEXT, tokenizer: bool = True) -> Path:
    """Fill `directory`; vocabulary 400, eos ids from three places."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "torch_dtype": "float32",
        "vocab_size": 400,
        "max_position_embeddings": context,
        "eos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 399], "temperature": 0.7}))
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    if tokenizer:
        byte_level_bpe().save(str(directory / "tokenizer.json"))
        special = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": CHAT_TEMPLATE}
        (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


def byte_level_bpe() -> Tokenizer:
    """A byte-level BPE tokenizer of the GPT-2 family: 256 bytes, a few merges, three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer
