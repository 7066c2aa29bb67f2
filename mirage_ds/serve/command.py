"""`mirage-ds serve`. Imports stay inside the functions: `--help` is quick."""

import signal
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from mirage_ds.config.extras import need
from mirage_ds.config.flags import CONTEXT, build_model, model_options
from mirage_ds.errors import STOP_SIGNALS, UserError, reason
from mirage_ds.serve.spec import ServeSpec


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path))
@model_options(ServeSpec)
def serve(folder: Path, **flags: Any) -> None:
    """Answer over HTTP, as OpenAI's chat completions.

    The model is that in FOLDER, whole on one GPU. Clients take http://HOST:PORT/v1 as their base URL.
    """
    spec = build_model(ServeSpec, flags)
    need("serve", "mirage-ds serve")
    from mirage_ds.data.images import ImageFinder
    from mirage_ds.evaluate.decoder import load_decoder
    from mirage_ds.serve.app import Server, Service

    with TemporaryDirectory(prefix="mirage-serve-") as scratch, listen(spec) as listener:
        # Pictures are found by the Reader's finder.
        decoder = load_decoder(folder, ImageFinder(()), spec.processor, None, spec.pixels)
        service = Service(decoder, spec, Path(scratch))
        server = Server(service)
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
