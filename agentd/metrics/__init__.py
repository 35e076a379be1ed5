"""Metrics: what the daemon counts and measures, for Prometheus and OpenTelemetry."""

from agentd.metrics.families import Family, Sources, collect
from agentd.metrics.receivers import Exporter, exporters

__all__ = ["Exporter", "Family", "Sources", "collect", "exporters"]
