"""Numbers of a server for Prometheus."""
from autoregressive.serve.protocol import EngineBackend, Job

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # bounds of the histogram of times


class Telemetry:
    """Counts and times of one server; `text` is what /metrics answers."""

    def __init__(self, backend: EngineBackend) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own = {"registry": self.registry, "namespace": "llamagen"}
        self.requests = Counter("requests", "Requests, by route and HTTP status (499: the client went away)",
                                ["route", "status"], **own)
        self.images = Counter("images", "Pictures handed out", ["model"], **own)
        self.seconds = Histogram("request_seconds", "Time from a request to its last picture", ["route"],
                                 buckets=SECONDS, **own)
        for name, text, value in (
                ("images_decoding", "Images that are decoded now", lambda: backend.decoding),
                ("images_waiting", "Images that wait for a place", lambda: backend.waiting),
                ("engine_ready", "1 if jobs are taken, 0 while models are loaded",
                 lambda: float(backend.state == "ready")),
                ("engine_restarts", "How often the process that draws was started again", lambda: backend.restarts)):
            Gauge(name, text, **own).set_function(value)

    def note(self, route: str, status: int, *, seconds: float | None = None) -> None:
        """Count a request; seconds: how long one took that got its pictures."""
        self.requests.labels(route, str(status)).inc()
        if seconds is not None:
            self.seconds.labels(route).observe(seconds)

    def note_picture(self, job: Job) -> None:
        """Count a picture."""
        self.images.labels(job.model).inc()

    def text(self) -> bytes:
        """All numbers in Prometheus' format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
