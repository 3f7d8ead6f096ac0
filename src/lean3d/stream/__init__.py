"""Live: models on cameras, streams and files, frame by frame.

source -> grabber (a thread; the latest frame wins) -> Session (one state a stream) -> predictions
       -> smoothing and hysteresis -> events (start, end, label, score) -> JSON lines, overlay
"""

from lean3d.stream.events import Event, EventTracker
from lean3d.stream.run import Summary, run
from lean3d.stream.session import Result, Session, StreamPrediction, Watch
from lean3d.stream.sources import Source, find_source, read_list

__all__ = [
    "Event",
    "EventTracker",
    "Result",
    "Session",
    "Source",
    "StreamPrediction",
    "Summary",
    "Watch",
    "find_source",
    "read_list",
    "run",
]
