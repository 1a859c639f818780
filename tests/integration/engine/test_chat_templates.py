"""Known chat templates as transformers renders them with the tokenizer of a merged model."""

import json

import pytest
import transformers

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.merges import recipe

pytestmark = pytest.mark.slow

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s> [INST] Be kind.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]"),
        (
            "alpaca",
            "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n"
            "### Instruction:\nBye\n\n### Response:\n",
        ),
        (
            "exaone",
            "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
            "[|user|]Bye\n[|assistant|]",
        ),
    ],
)
def test_transformers_renders_known_templates_of_merged_models(tmp_path, name, expected):
    family = make_family(tmp_path / "models", num_experts=2, hidden=16, layers=1)
    tokenizer_file = family.experts[0] / "tokenizer.json"
    whole = {"added_tokens": [], **json.loads(tokenizer_file.read_text())}
    tokenizer_file.write_text(json.dumps(whole))
    storage = open_storage()
    document = recipe(family, "linear") | {"chat_template": name}
    made = make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / "out"))
    run_plan(made, storage)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == expected
