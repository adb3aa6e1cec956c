"""A page to look inside: both continuations of a prompt, and what the memory did to each of their tokens.

    python -m demo.app                                    the memory that scripts/quickstart.sh trained
    python -m demo.app --model_name_or_path BASE --knn_generator_path MEMORY [--dstore_path … --index_path …
        --dataset_name …]

Served on this machine's loopback address unless --host says otherwise; the page loads nothing from elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
from dataclasses import dataclass
from typing import Any

from demo.pair import Pair, PairArguments, choose_pair, open_pair
from utils.cli import command, flag, parse
from utils.errors import InputError, one_line

# The browser enforces what the page is built to do: nothing is loaded from elsewhere.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'"
)


@dataclass
class PageArguments:
    """Where the page is served, and where training passages are looked up."""

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = flag(7860, "port to listen on; 0 takes any free one")
    dstore_path: str | None = flag(None, "datastore for the nearest training passages")
    index_path: str | None = flag(None, "its FAISS index")
    dataset_name: str | None = flag(None, "the windows folder that it was written from")
    dataset_split_name: str = flag("train", "split of the windows that the datastore holds")
    passages: int = flag(3, "training passages shown for a token; 0 for none")
    candidates: int = flag(6, "candidates shown of base, memory and mixture each")


def main() -> None:
    pair_arguments, page_arguments = parse(PairArguments, PageArguments, description=__doc__.split("\n")[0])
    if importlib.util.find_spec("gradio") is None:
        raise InputError('the page needs the package gradio; install it with: pip install -c constraints.txt ".[demo]"')
    for name, least in (("passages", 0), ("candidates", 1)):
        if getattr(page_arguments, name) < least:
            raise InputError(f"--{name} {getattr(page_arguments, name)}: expected {least} or more")
    pair = choose_pair(pair_arguments)
    with listen(page_arguments.host, page_arguments.port) as listener:
        joint, tokenizer = open_pair(pair, pair_arguments)
        # Read when Gradio is imported.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from demo.layout import build
        from demo.viewer import Viewer

        passages = open_passages(page_arguments, pair_arguments, pair, joint, tokenizer)
        counts = {"passage_count": page_arguments.passages, "candidate_count": page_arguments.candidates}
        serve(build(Viewer(joint, tokenizer, passages, **counts), pair), listener)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises InputError when the port is taken or the address is none of ours."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        told = f"--host {host} --port {port}: cannot listen there ({one_line(error)})"
        raise InputError(f"{told}; port 0 takes any free one") from None


def open_passages(arguments: PageArguments, base: PairArguments, pair: Pair, joint: Any, tokenizer: Any) -> Any:
    """The training passages of the flags, else of the quickstart; None where there are none."""
    named = (arguments.dstore_path, arguments.index_path, arguments.dataset_name)
    places = named if any(named) else (pair.dstore_path, pair.index_path, pair.dataset_name)
    if arguments.passages == 0 or not any(places):
        return None
    from demo.passages import Passages
    from utils.cli import say

    belongs = {"dim": joint.config.hidden_size, "base": base}
    try:
        return Passages(*places, tokenizer, split=arguments.dataset_split_name, **belongs)
    except InputError as error:
        if any(named):
            raise
        say(f"no training passages are shown: {error}")
        return None


def serve(blocks: Any, listener: socket.socket) -> None:
    """Serve the page on `listener` until the process is interrupted."""
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from demo import page

    application = FastAPI(openapi_url=None)

    @application.middleware("http")
    async def own_resources_only(request: Any, answer: Any) -> Any:
        answered = await answer(request)
        answered.headers["content-security-policy"] = CONTENT_POLICY
        return answered

    # System fonts: Gradio's own would be looked for elsewhere.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    gradio.mount_gradio_app(
        application,
        blocks,
        path="/",
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        theme=gradio.themes.Default(primary_hue="teal", neutral_hue="slate", **fonts),
        css=page.asset("page.css"),
        head=f"<script>{page.asset('page.js')}</script>",
    )
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    # Open pages keep a connection open, which is no reason to stay.
    settings = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    command(main)()
