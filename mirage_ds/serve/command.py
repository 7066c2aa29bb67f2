"""`mirage-ds serve`. Imports stay inside the functions: `--help` is quick."""

from __future__ import annotations

import logging
import os
import signal
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from mirage_ds.config.extras import need
from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.errors import STOP_SIGNALS, UserError, reason
from mirage_ds.serve.spec import KEY_VARIABLE, ServeSpec

if TYPE_CHECKING:
    import uvicorn

    from mirage_ds.evaluate.decoder import Decoder
    from mirage_ds.serve.app import Service

# Seconds between the end of what still runs after --grace and that of the connections.
PARTING_S = 10


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(ServeSpec)
def serve(folder: Path, **flags: Any) -> None:
    """Answer over HTTP, as OpenAI's chat completions.

    The model is that in FOLDER. Clients take http://HOST:PORT/v1 as their base URL.
    """
    spec = build_model(ServeSpec, flags)
    need("serve", "mirage-ds serve")
    if spec.files and not spec.files.is_dir():
        raise UserError(f"--files {spec.files}: no folder; give one that is there")
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.evaluate.decoder import load_decoder

    with TemporaryDirectory(prefix="mirage-serve-") as scratch, listen(spec) as listener:
        # Pictures are found by the Reader's finder.
        decoder = load_decoder(folder, ImageFinder(()), spec.processor, None, spec.pixels)
        service = service_of(decoder, spec, Path(scratch))
        server = make_server(service)
        # uvicorn takes them over, and at its end raises them once more: for itself, when nothing is left to stop.
        for number in STOP_SIGNALS:
            signal.signal(number, server.handle_exit)
        host, port = listener.getsockname()[:2]
        click.echo(f"{service.name}: http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        if not (service.key or host.startswith("127.") or host == "::1"):
            click.echo(f"whoever reaches {host}:{port} may ask: there is no --api_key", err=True)
        server.run(sockets=[listener])
        service.engine.join()
    click.echo("stopped")


def listen(spec: ServeSpec) -> socket.socket:
    """Open the socket; UserError where that cannot be."""
    try:
        family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
        return socket.create_server((spec.host, spec.port), family=family)
    except OSError as error:
        raise UserError(f"--host {spec.host} --port {spec.port}: {reason(error)}; give others") from None


def service_of(decoder: Decoder, spec: ServeSpec, scratch: Path) -> Service:
    """Put a model behind its routes.

    Args:
        scratch: an empty folder for pictures, while they are encoded.

    Raises:
        UserError: it has no latents that --latents could replace.
    """
    from mirage_ds.evaluate.decoder import need_latents, run_limits
    from mirage_ds.model.generate import Limits
    from mirage_ds.serve.app import Service
    from mirage_ds.serve.engine import Engine
    from mirage_ds.serve.prompt import Reader

    if spec.latents != "own":
        if not decoder.latents:
            raise UserError(f"--latents {spec.latents}: {decoder.folder} was never trained on latents; leave it out")
        need_latents(decoder)
    room = spec.model_dump(include={"prefill_tokens", "rows", "cache_gb"})
    limits = run_limits(decoder, spec.max_new_tokens, Limits.longest_run, spec.run_length, **room)
    engine = Engine(decoder, limits, spec.latents, spec.return_latents)
    longest = decoder.loaded.model.language_model.config.max_position_embeddings
    reader = Reader(decoder.encoder, scratch, spec.files, longest)
    return Service(decoder.folder.name, engine, reader, spec, spec.api_key or os.environ.get(KEY_VARIABLE))


def make_server(service: Service) -> uvicorn.Server:
    """Make what serves until it is told to exit, and lets end what runs then."""
    import uvicorn

    # Which warns of every client that goes away amid a stream.
    logging.getLogger("asyncio").setLevel(logging.ERROR)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.engine.close(service.spec.grace)
            super().handle_exit(sig, frame)

    quiet: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}
    return Server(uvicorn.Config(service, timeout_graceful_shutdown=service.spec.grace + PARTING_S, **quiet))
