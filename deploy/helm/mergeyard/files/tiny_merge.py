"""Makes three tiny models below a storage root, has the service merge them, looks at the result.

The program of ``helm test``: it needs MERGEYARD_URL, MERGEYARD_TOKEN and MERGEYARD_TEST_ROOT, and
takes away what it made.
"""

from __future__ import annotations

import json
import os
import secrets
import sys

import numpy as np
from safetensors.numpy import load, save

from merging.storage.base import Storage
from merging.storage.router import open_storage
from service.client import Client

SIZE = 64
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS_FILE = "model.safetensors"


def main() -> int:
    """Merge and compare; the exit status."""
    root = os.environ["MERGEYARD_TEST_ROOT"].rstrip("/")
    folder = f"{root}/mergeyard-test-{secrets.token_hex(8)}"
    storage = open_storage()
    values = {"base": 1.0, "one": 2.0, "two": 4.0}
    try:
        for name, value in values.items():
            write_model(storage, f"{folder}/{name}", value)
        return run(storage, folder)
    finally:
        for found in storage.list(folder):
            storage.delete(found.uri)


def write_model(storage: Storage, folder: str, value: float) -> None:
    """A model of one layer whose weights are all the same."""
    weights = save({WEIGHT: np.full((SIZE, SIZE), value, dtype=np.float32)}, {"format": "pt"})
    storage.write_bytes(f"{folder}/{WEIGHTS_FILE}", weights)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    storage.write_bytes(f"{folder}/config.json", json.dumps(config).encode())


def run(storage: Storage, folder: str) -> int:
    """Submit, wait, and read what came."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": f"{folder}/base",
        "models": [{"model": f"{folder}/one"}, {"model": f"{folder}/two"}],
    }
    with Client(os.environ["MERGEYARD_URL"], os.environ["MERGEYARD_TOKEN"]) as client:
        job = client.submit(recipe, f"{folder}/merged")
        print(f"job {job['id']}", flush=True)
        job = client.wait(job["id"])
    if job["state"] != "succeeded":
        print(f"{job['state']}: {(job['error'] or {}).get('detail', 'no reason given')}")
        return 1
    (file,) = (f for f in storage.list(f"{folder}/merged") if f.uri.endswith(".safetensors"))
    merged = load(storage.read_bytes(file.uri, limit=1 << 20))[WEIGHT]
    is_right = bool((merged == 1.0 + 1.0 + 3.0).all())  # the base and both task vectors
    print("the merged model is right" if is_right else f"the merged model is wrong: {merged}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
