"""What tells one base model from another, without opening its weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
VOLATILE = ("_name_or_path", "transformers_version")  # entries of a config.json that do not describe the model


def base_id(path: str | os.PathLike, *, trust_remote_code: bool = False) -> str:
    """The id of a base model: SHA-256 of its config with the names and sizes of its weight files (on the hub: the commit).

    Raises OSError or ValueError where there is no readable config.
    """
    folder = Path(path)
    if folder.is_dir():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights: Any = sorted((file.name, file.stat().st_size) for kind in WEIGHT_FILES for file in folder.glob(kind))
    else:
        from transformers import AutoConfig

        loaded = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        config, weights = loaded.to_dict(), loaded._commit_hash
    config = {name: value for name, value in config.items() if name not in VOLATILE}
    return hashlib.sha256(json.dumps([config, weights], sort_keys=True, default=str).encode()).hexdigest()
