"""Without the extra `serve`, or the client, there is nothing to test here."""

from importlib.util import find_spec

collect_ignore = (
    [] if all(map(find_spec, ("openai", "prometheus_client", "starlette", "uvicorn"))) else ["test_serve.py"]
)
