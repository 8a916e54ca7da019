"""Spans of OpenTelemetry, where the operator asks for them, by its conventions for generative models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from saferedir.engines.errors import MissingDependencyError

#: Sets attributes of the span that is open.
Tell = Callable[..., None]


class Tracing:
    """Opens spans; without a tracer it does nothing."""

    def __init__(self, tracer: Any = None) -> None:
        self._tracer = tracer

    @classmethod
    def to(cls, endpoint: str | None) -> Tracing:
        """Spans sent to an OTLP `endpoint` over HTTP; none where it is None.

        Raises:
            MissingDependencyError: OpenTelemetry is not installed.
        """
        if endpoint is None:
            return cls()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingDependencyError(f"tracing needs the package {error.name}; install saferedir[tracing]") from error
        provider = TracerProvider(resource=Resource.create({"service.name": "saferedir"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        return cls(provider.get_tracer("saferedir"))

    @contextmanager
    def span(self, model: str, **attributes: Any) -> Iterator[Tell]:
        """One request, with `attributes` whose names have a dot for every two underscores; the yielded function sets more."""
        if self._tracer is None:
            yield lambda **more: None
            return
        with self._tracer.start_as_current_span(f"generate_content {model}") as span:

            def tell(**more: Any) -> None:
                for name, value in more.items():
                    if value is not None:
                        span.set_attribute(name.replace("__", "."), value)

            tell(
                gen_ai__operation__name="generate_content", gen_ai__provider__name="saferedir", gen_ai__request__model=model,
                gen_ai__output__type="image", **attributes,
            )  # fmt: skip
            yield tell
