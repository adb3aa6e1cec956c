"""A web page that shows both continuations of a prompt, and what the memory did to each token.

python -m demo.app                                    the memory trained by scripts/quickstart.sh
python -m demo.app --model_name_or_path BASE --knn_generator_path MEMORY [--dstore_path … --index_path …
    --dataset_name …]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from demo.pair import PairArguments, Sampling, choose_pair, open_pair, short_name
from utils.cli import command, flag, parse
from utils.errors import InputError


@dataclass
class PageArguments:
    """Where the page is served, and where training passages are looked up."""

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 admits other machines")
    port: int = flag(7860, "port to listen on; 0 for the first free one from 7860 on")
    dstore_path: str | None = flag(None, "datastore for the nearest training passages; if not given, the quickstart's")
    index_path: str | None = flag(None, "its FAISS index")
    dataset_name: str | None = flag(None, "the windows that it was made from")
    dataset_split_name: str = flag("train", "split of the windows that the datastore holds")
    passages: int = flag(3, "training passages shown per token; 0 for none")
    candidates: int = flag(6, "candidates shown per token, of base, memory and mixture each")


def main() -> None:
    pair_arguments, sampling, arguments = parse(
        PairArguments, Sampling, PageArguments, description=__doc__.split("\n")[0]
    )
    pair = choose_pair(pair_arguments)
    files = (arguments.dstore_path, arguments.index_path, arguments.dataset_name)
    if any(files) and not all(files):
        raise InputError("--dstore_path, --index_path and --dataset_name: expected all three or none")
    files = files if all(files) else pair.passages
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import gradio

    from demo.passages import Passages
    from demo.viewer import Viewer, build

    joint, tokenizer = open_pair(pair, pair_arguments)
    passages = None
    if files is not None and arguments.passages > 0:
        passages = Passages(*files, arguments.dataset_split_name, tokenizer, pair_arguments)
    viewer = Viewer(
        joint,
        tokenizer,
        list(map(short_name, pair.knn_generator_path)),
        passages,
        arguments.passages,
        arguments.candidates,
    )
    folder = Path(__file__).parent
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # Gradio's default loads from Google
    build(viewer, pair, sampling).launch(
        server_name=arguments.host,
        server_port=arguments.port or None,
        theme=gradio.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts),
        css_paths=folder / "page.css",
        head=f"<script>{(folder / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=[],
        ssr_mode=False,
    )


if __name__ == "__main__":
    command(main)()
