"""Tasks and streams."""

from mllm_cl.streams.stream import Stream, Task

__all__ = ["Stream", "Task"]
