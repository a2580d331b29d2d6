"""`secateur serve`: a model in a folder, behind HTTP."""

import contextlib
import socket
import warnings
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import aside, say
from secateur.cli.groups import Loading
from secateur.cli.running import counted, linear_layers
from secateur.integrations.chat import chat_template
from secateur.integrations.tokens import read_tokenizer
from secateur.integrations.transformers import read_config

# Seconds that a text may go on being written after Ctrl-C.
LEFT = 3


@command()
def serve(
    *,
    model: o.Folder,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen at; 0 takes a free one.")
    ] = 8000,
    loading: Loading,
) -> None:
    """Answer requests for text, as OpenAI's API has them, by a model of any kind.

    Completions, chats if the folder has a chat template, whole or streamed, one after the other.
    It serves until Ctrl-C. There is no key and no encryption.
    """
    try:
        import uvicorn

        from secateur.llm.server import Served, application
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(
            f"serving needs {package}, not installed: pip install 'secateur[serve]'"
        ) from error
    read_config(model)
    tokenizer = read_tokenizer(model, "copy the one that the model was trained with")
    template = chat_template(model)
    with _place(host, port) as place:
        loaded = loading.model(model)
        name = model.resolve().name
        app = application(Served(name, loaded, tokenizer, template, aside))
        # It has just said so, and each request would again.
        warnings.filterwarnings("ignore", message="generate does not apply")
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LEFT)
        )
        place.listen()
        aside(counted(linear_layers(loaded)))
        say(f"serving {name} at {_url(place)}/v1, until Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again at its end
            server.run(sockets=[place])


def _place(host: str, port: int) -> socket.socket:
    """A socket at this address, before anything slow is done.

    Raises: ValueError if there can be none.
    """
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, *_, address = found[0]
            place = stack.enter_context(socket.socket(family, kind))
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
        except OSError as error:
            raise ValueError(
                f"cannot listen at {host} port {port}: {error.strerror}: name an address of this "
                "machine with --host, or another port with --port; 0 takes a free one"
            ) from error
        stack.pop_all()
    return place


def _url(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
