"""Tasks and streams."""

from mllm_cl.streams.arrange import arrange
from mllm_cl.streams.catalogue import load_benchmark, load_stream, stream_of_section
from mllm_cl.streams.stream import Stream, Task
from mllm_cl.streams.user import read_stream

__all__ = ["Stream", "Task", "arrange", "load_benchmark", "load_stream", "read_stream", "stream_of_section"]
