"""Tasks and streams."""

from mllm_cl.streams.arrange import arrange
from mllm_cl.streams.catalogue import load_benchmark, load_stream, stream_of_section
from mllm_cl.streams.statistics import describe
from mllm_cl.streams.stream import Stream, Task
from mllm_cl.streams.user import read_stream
from mllm_cl.streams.validate import StreamReport, ensure_valid, validate_stream

__all__ = [
    "Stream",
    "StreamReport",
    "Task",
    "arrange",
    "describe",
    "ensure_valid",
    "load_benchmark",
    "load_stream",
    "read_stream",
    "stream_of_section",
    "validate_stream",
]
